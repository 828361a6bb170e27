"""A page: a title, sentences, and sections of figures, tables, facts and texts -> one HTML file.

The page asks nothing of the network and runs no script but its own, which its policy names by
their digests. All text goes through the template's escaping.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from tether.errors import ConfigError
from tether.report.figures import Data, Figure, missing_library
from tether.report.figures.drawing import Value, rounded
from tether.report.text import printable


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a table.

    Attributes:
        text: as it is shown.
        value: what it is sorted by, and what is downloaded; a number or a text.
    """

    text: str
    value: Value

    @classmethod
    def number(cls, value: float | None, form: str = ".4g") -> "Cell":
        """A number, "–" where it is not known.

        Args:
            value: finite, or None.
            form: of the text, as of `format`.

        Returns:
            the cell.
        """
        return cls("–" if value is None else format(value, form), rounded(value))

    @classmethod
    def word(cls, text: str) -> "Cell":
        """A text.

        Args:
            text: as it is shown, sorted and downloaded.

        Returns:
            the cell.
        """
        return cls(text, text)


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose columns can be sorted.

    Attributes:
        name: in the page's addresses and the names of downloads: a-z, 0-9 and "-".
        title: in plain words.
        caption: how to read it.
        columns: their names.
        rows: each as long as `columns`; the first cell names the row.
        opens: name of a figure with choices: a row's first cell leads there, and makes the choice
            of the row's number.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    opens: str | None = None

    @property
    def data(self) -> Data:
        """Its values, for download."""
        return Data(self.columns, tuple(tuple(cell.value for cell in row) for row in self.rows))


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values.

    Attributes:
        items: name -> value.
    """

    items: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph.

    Attributes:
        text: plain; nothing in it is read as HTML.
    """

    text: str


_NAME = re.compile("[a-z][a-z0-9-]*")

Part = Figure | Table | Facts | Text


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page under a heading.

    Attributes:
        title: the heading.
        parts: in order.
    """

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A page.

    Attributes:
        title: of the page.
        summary: sentences at its head: what a reader should take away.
        sections: those without parts are left out.
        foot: a sentence at its end: what made it.
    """

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    foot: str = ""


def render(page: Page) -> str:
    """Make the page.

    Args:
        page: the values.

    Returns:
        HTML; the same values give the same text.

    Raises:
        ConfigError: two figures or tables have one name, or a name that is none.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if (missing := missing_library()) is not None:
        raise missing
    _check_names(page)
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _resource("page.css"), _resource("page.js")
    return environment.from_string(_resource("page.html")).render(
        page=page,
        sections=[section for section in page.sections if section.parts],
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        kind=lambda part: type(part).__name__.lower(),
        groups=_groups(page),
        picture=lambda figure: Markup(figure.svg),
        embedded=lambda part: Markup(embedded(part.data)),
    )


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy that allows one style and one script and nothing else.

    Args:
        style: the text between the style tags.
        script: the text between the script tags.

    Returns:
        the policy.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def embedded(data: Data) -> str:
    """Data as JSON that cannot end the element that holds it.

    Args:
        data: of a figure or a table.

    Returns:
        JSON without "<", ">" and "&".

    Raises:
        ValueError: a value is NaN or infinite.
    """
    text = json.dumps(
        {"columns": data.columns, "rows": data.rows}, separators=(",", ":"), allow_nan=False
    )
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _check_names(page: Page) -> None:
    seen: set[str] = set()
    for section in page.sections:
        for part in section.parts:
            if not isinstance(part, Figure | Table):
                continue
            if not _NAME.fullmatch(part.name):
                raise ConfigError(f"{part.name!r} is no name of a figure: use a-z, 0-9 and '-'.")
            if part.name in seen:
                raise ConfigError(f"two parts of the page are named {part.name!r}; rename one.")
            seen.add(part.name)


def _finalize(value: Any) -> Any:
    """Strings without what HTML cannot hold; what is safe already stays so."""
    return printable(value) if type(value) is str else value


def _groups(page: Page) -> dict[tuple[str, ...], int]:
    """The choices of a page, numbered: figures with the same ones change together."""
    return {choices: n for n, choices in enumerate(dict.fromkeys(_choices(page)))}


def _choices(page: Page) -> Iterator[tuple[str, ...]]:
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Figure) and part.choices:
                yield part.choices


def _resource(name: str) -> str:
    return files("tether.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
