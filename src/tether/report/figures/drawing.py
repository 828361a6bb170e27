"""What all pictures share: a canvas whose marks have hover values, and the figure it becomes."""

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tether.errors import MissingExtraError
from tether.report.figures import svg
from tether.report.text import printable

Value = str | int | float | None
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
    "svg.hashsalt": "tether",  # the same values give the same bytes
    "text.parse_math": False,  # names from files are shown as they are
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": svg.LINE,
    "axes.labelcolor": svg.SOFT,
    "axes.labelsize": 10,
    "xtick.color": svg.LINE,
    "ytick.color": svg.LINE,
    "xtick.labelcolor": svg.SOFT,
    "ytick.labelcolor": svg.SOFT,
    "text.color": svg.INK,
    "grid.color": svg.LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True, slots=True)
class Data:
    """The numbers of a figure, as a table.

    Attributes:
        columns: their names.
        rows: each as long as `columns`, or shorter where the last values are missing.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class _Curve:
    """As `svg.Curve`, in the coordinates of the axes."""

    choice: int
    color: str
    title: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture of a page.

    Attributes:
        name: in the page's addresses and the names of downloads: a-z, 0-9 and "-".
        title: in plain words.
        caption: how to read it.
        alt: what a reader who cannot see it should know.
        svg: the picture.
        data: its numbers.
        choices: what one of is shown at a time; empty where all is shown. Figures of a page with
            the same choices change together.
        chosen: index of the one that is shown at first.
        wide: whether it needs the page's whole width.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    data: Data
    choices: tuple[str, ...] = ()
    chosen: int = 0
    wide: bool = False


class Drawing:
    """A canvas of one pair of axes; colours are those of `svg`, which a page gives their values.

    To be drawn on within a `with` block: matplotlib's settings are the page's there.

    Attributes:
        axes: matplotlib's.
    """

    axes: Any

    def __init__(self, width: float = 5.2, height: float = 3.0) -> None:
        """Choose a size.

        Args:
            width: in inches of 72 points.
            height: the same.
        """
        self._size = width, height
        self._marks: dict[str, svg.Mark] = {}
        self._curves: list[_Curve] = []
        self._settings = ExitStack()

    def __enter__(self) -> "Drawing":
        """Make an empty canvas."""
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        self._settings.enter_context(mpl.rc_context(_SETTINGS))
        self._layout = ConstrainedLayoutEngine()
        self._canvas = Canvas(figsize=self._size, dpi=72, layout=self._layout)
        self.axes = self._canvas.add_subplot()
        self._canvas.patch.set_alpha(0)
        self.axes.patch.set_alpha(0)
        return self

    def __exit__(self, *_: object) -> None:
        """Put matplotlib's settings back."""
        self._settings.close()

    def mark(self, artist: Any, title: str | Sequence[str], opens: int | None = None) -> None:
        """Give an artist its hover value.

        Args:
            artist: matplotlib's.
            title: the value; or one for each of its points.
            opens: the choice that a click on it makes.
        """
        key = f"mark-{len(self._marks)}"
        artist.set_gid(key)
        single = isinstance(title, str)
        titles = [title] if isinstance(title, str) else title
        self._marks[key] = svg.Mark(tuple(map(printable, titles)), not single, opens)

    def curve(
        self,
        choice: int,
        color: str,
        title: str,
        points: Sequence[tuple[float, float]],
        dots: Sequence[tuple[float, float, str]],
    ) -> None:
        """Draw a line that is shown with one choice; the axes grow to hold it.

        Args:
            choice: index of the choice.
            color: one of `svg`'s.
            title: hover value of the line.
            points: of the line, two at least to be seen.
            dots: (x, y, hover value).
        """
        self._curves.append(_Curve(choice, color, title, points, dots))
        self.axes.update_datalim(points)

    def legend(self) -> None:
        """Explain the colours above the axes, where nothing is covered."""
        handles, labels = self.axes.get_legend_handles_labels()
        self._canvas.legend(handles, labels, loc="outside upper right", ncols=len(labels))

    def to_svg(self, name: str, chosen: int = 0) -> str:
        """The picture as an element of a page.

        Args:
            name: of the figure; begins every id in it.
            chosen: index of the choice whose curves are shown at first.

        Returns:
            an <svg> element without styles, scripts and addresses.
        """
        self.axes.autoscale_view()
        out = io.StringIO()
        with warnings.catch_warnings():
            # Signs that its font lacks: the page's fonts draw the text, not matplotlib's.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            # The layout once: saving would find it twice more.
            self._layout.execute(self._canvas)
            self._canvas.set_layout_engine("none")
            self._canvas.savefig(out, format="svg", metadata=svg.NO_METADATA)
        curves = [self._placed(curve) for curve in self._curves]
        return svg.clean(out.getvalue(), name, self._marks, curves, chosen)

    def _placed(self, curve: "_Curve") -> svg.Curve:
        """A curve in the picture's coordinates, whose y goes down."""
        height = 72 * self._size[1]

        def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
            placed = self.axes.transData.transform(points).tolist() if points else []
            return [(x, height - y) for x, y in placed]

        dots = [
            (x, y, printable(title))
            for (x, y), (*_, title) in zip(
                place([(x, y) for x, y, _ in curve.dots]), curve.dots, strict=True
            )
        ]
        return svg.Curve(
            curve.choice, curve.color, printable(curve.title), place(curve.points), dots
        )

    def log_scale(self, axis: str) -> None:
        """Make an axis logarithmic, its ticks written without mathematics: 10⁻³.

        Args:
            axis: "x" or "y".
        """
        from matplotlib.ticker import FuncFormatter, NullFormatter

        getattr(self.axes, f"set_{axis}scale")("log")
        shown = getattr(self.axes, f"{axis}axis")
        shown.set_major_formatter(FuncFormatter(_power))
        shown.set_minor_formatter(NullFormatter())


def label(text: str, limit: int = 40) -> str:
    """A name as it fits into a picture: its end tells more than its beginning.

    Args:
        text: from a file perhaps.
        limit: most signs.

    Returns:
        the text, or "…" and its end.
    """
    text = printable(text)
    return text if len(text) <= limit else "…" + text[1 - limit :]


def rounded(value: float | None) -> float | None:
    """A number as it is kept in a page: six digits.

    Args:
        value: finite, or None.

    Returns:
        the number.
    """
    return None if value is None else float(f"{value:.6g}")


def missing_library() -> MissingExtraError | None:
    """Whether pages can be made here.

    Returns:
        None if they can, else the error to raise or to show.
    """
    for name in ("matplotlib", "jinja2"):
        if find_spec(name) is None:
            return MissingExtraError(
                f"a page needs the package {name!r}. Install tether with its extra 'report': "
                "pip install '.[report]' in its folder."
            )
    return None


def _power(value: float, _place: int | None = None) -> str:
    exponent = math.log10(value)
    if -2 <= exponent <= 3:
        return f"{value:g}"
    return f"10{str(round(exponent)).translate(_SUPERSCRIPTS)}"
