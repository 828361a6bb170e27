"""Labelled files: a text and its label in every row."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tether.errors import DataError

MAX_LABELS = 64  # each costs a sequence for every row
MAX_BYTES = 256 * 2**20
_FORMS = ".csv with the columns text and label, or .jsonl with text and label in every object"


@dataclass(frozen=True, slots=True)
class Row:
    """One text and what it is.

    Attributes:
        text: not empty.
        label: one of the file's labels.
        line: of the file, on which the row begins, from 1.
    """

    text: str
    label: str
    line: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows of a labelled file.

    Attributes:
        path: of the file, for messages.
        rows: at least one.
        labels: every label of the file, sorted; at least two.
    """

    path: str
    rows: tuple[Row, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def sample(self, limit: int | None) -> "Labelled":
        """At most so many rows, drawn at random, the same every time, in the file's order.

        Not evenly spaced: files often have their labels in turn.

        Args:
            limit: most rows, at least 1; None for all.

        Returns:
            a new value, with all the labels of the file.
        """
        if limit is None or limit >= len(self.rows):
            return self
        drawn = np.random.default_rng(0).choice(len(self.rows), size=limit, replace=False)
        return Labelled(self.path, tuple(self.rows[i] for i in np.sort(drawn)), self.labels)

    def majority(self) -> tuple[str, float]:
        """What is right when nothing is known of the texts.

        Returns:
            the most frequent label, and its share of the rows.
        """
        counts = Counter(row.label for row in self.rows)
        label = min(counts, key=lambda name: (-counts[name], name))
        return label, counts[label] / len(self.rows)


def is_labelled(path: str | None) -> bool:
    """Whether a file is meant as a labelled one: a .csv, or a .jsonl whose first line has a label.

    Args:
        path: of a file that may be anything, or missing.

    Returns:
        whether `load` is the reader for it.
    """
    file = Path(path or "")
    if file.suffix == ".csv":
        return True
    if file.suffix != ".jsonl" or not file.is_file():
        return False
    try:
        with file.open(encoding="utf-8-sig") as lines:
            record = json.loads(next((line for line in lines if line.strip()), "null"))
    except (ValueError, RecursionError, OSError):
        return False  # the other reader names what is wrong
    return isinstance(record, dict) and "label" in record


def load(path: str) -> Labelled:
    """Read a labelled file.

    Args:
        path: .csv with a header that has the columns text and label (others are left alone), or
            .jsonl with on every line an object with a string "text" and a string or whole number
            "label". Blank lines are passed over; spaces around a label are no part of it.

    Returns:
        its rows.

    Raises:
        DataError: naming the file, the line and what is wrong.
    """
    suffix = Path(path).suffix
    if suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path}: the name must end in .csv or .jsonl, not {suffix!r}.")
    content = _read(path)
    found = _csv(path, content) if suffix == ".csv" else _jsonl(path, content)
    rows: list[Row] = []
    labels: set[str] = set()
    for line, text, label in found:
        rows.append(_row(path, line, text, label))
        labels.add(rows[-1].label)
        if len(labels) > MAX_LABELS:
            raise DataError(
                f"{path}, line {line}: {rows[-1].label!r} is label {len(labels)}; at most "
                f"{MAX_LABELS} are scored, as each costs a sequence for every row. Give a file "
                "whose labels are classes."
            )
    if not rows:
        raise DataError(f"{path}: has no rows. Give a {_FORMS}.")
    if len(labels) == 1:
        where = f"{len(rows)} rows from line {rows[0].line} to {rows[-1].line}"
        raise DataError(
            f"{path}: all {where} have the label {rows[0].label!r}; to tell labels apart there "
            "must be at least 2."
        )
    return Labelled(path, tuple(rows), tuple(sorted(labels)))


def _read(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes exceed the limit of {MAX_BYTES}. Give a part.")
        # A byte order mark, which spreadsheets write, is no part of the first column's name.
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _csv(path: str, content: str) -> Iterator[tuple[int, Any, Any]]:
    """Line, text and label of every row."""
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            line, begins = reader.line_num + 1, line
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = _header(path, begins, fields)
            elif len(fields) != len(header):
                raise DataError(
                    f"{path}, line {begins}: has {len(fields)} fields, and the header "
                    f"{len(header)}. Put texts that hold commas or quotes in quotes."
                )
            else:
                yield begins, fields[header.index("text")], fields[header.index("label")]
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not valid CSV: {error}.") from error


def _header(path: str, line: int, fields: Sequence[str]) -> list[str]:
    names = [field.strip() for field in fields]
    for name in ("text", "label"):
        if names.count(name) != 1:
            raise DataError(
                f"{path}, line {line}: has {names.count(name)} columns {name!r} among {names}; "
                "expected a header with one 'text' and one 'label', separated by commas."
            )
    return names


def _jsonl(path: str, content: str) -> Iterator[tuple[int, Any, Any]]:
    """Line, text and label of every object."""
    # Not splitlines: JSON may hold other characters that Python takes for the end of a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}.") from error
        if not isinstance(record, dict) or not {"text", "label"} <= record.keys():
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{where}: has {keys}; expected 'text' and 'label', as the first line.")
        label = record["label"]
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        yield number, record["text"], label


def _row(path: str, line: int, text: Any, label: Any) -> Row:
    where = f"{path}, line {line}"
    for name, value in (("text", text), ("label", label)):
        if not isinstance(value, str):
            also = " or a whole number" if name == "label" else ""
            raise DataError(f"{where}: {name} is {value!r}; expected a string{also}.")
        if not value.strip():
            raise DataError(f"{where}: {name} is empty. Fill it in, or take the row out.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a character (\\ud800 to \\udfff).") from error
    return Row(text, label.strip(), line)
