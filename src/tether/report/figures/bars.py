"""Bars of one or more values a name: sizes, times, shares."""

from collections.abc import Mapping, Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, label, rounded
from tether.report.figures.svg import SERIES

_MOST = 40  # names drawn; the data has all


def bars(
    name: str,
    title: str,
    caption: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    unit: str = "",
) -> Figure:
    """Draw a group of horizontal bars for each name.

    Args:
        name: of the figure.
        title: of the figure.
        caption: how to read it.
        names: what is measured; those past the first 40 are in the data only.
        series: label -> one value for each name, not negative.
        unit: of the values.

    Returns:
        the figure.
    """
    shown = names[:_MOST]
    height = 0.9 + 0.26 * max(1.0, 0.75 * len(series)) * len(shown)
    with Drawing(height=height) as drawing:
        for number, (text, values) in enumerate(series.items()):
            _draw(drawing, shown, text, values[: len(shown)], (number, len(series)), unit)
        axes = drawing.axes
        axes.set_yticks(range(len(shown)), [label(each) for each in shown])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(y=0.02)
        most = max(max(values[: len(shown)]) for values in series.values())
        axes.set_xlim(0, (most or 1) * (1.15 if len(series) == 1 else 1.05))
        axes.set_xlabel(unit.strip())
        axes.grid(axis="x")
        if len(series) > 1:
            drawing.legend()
        picture = drawing.to_svg(name)
    rows = [
        (each, *(rounded(values[row]) for values in series.values()))
        for row, each in enumerate(names)
    ]
    return Figure(
        name=name,
        title=title,
        caption=caption + _left_out(len(names) - len(shown)),
        alt=_told(shown, series, unit),
        svg=picture,
        data=Data(("name", *series), tuple(rows)),
    )


def _draw(
    drawing: Drawing,
    names: Sequence[str],
    text: str,
    values: Sequence[float],
    place: tuple[int, int],
    unit: str,
) -> None:
    """One series: its number among all of them decides colour and place."""
    number, count = place
    thick = 0.8 / count
    rows = [row + (number - (count - 1) / 2) * thick for row in range(len(names))]
    color = SERIES[number % len(SERIES)]
    drawn = drawing.axes.barh(rows, values, thick * 0.92, color=color, label=text)
    for bar, row, what, value in zip(drawn, rows, names, values, strict=True):
        drawing.mark(bar, f"{what}, {text}: {value:.4g}{unit}")
        if count == 1:
            drawing.axes.annotate(
                f"{value:.4g}",
                (value, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )


def _left_out(count: int) -> str:
    return f" {count} more are in the data." if count else ""


def _told(names: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    parts = []
    for text, values in series.items():
        most = max(range(len(names)), key=values.__getitem__)
        parts.append(f"{text}: largest {values[most]:.4g}{unit} ({names[most]}).")
    return " ".join(parts)
