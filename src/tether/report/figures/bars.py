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
    reference: float | None = None,
) -> Figure:
    """Draw a group of horizontal bars for each name.

    Args:
        name: of the figure.
        title: of the figure.
        caption: how to read it.
        names: what is measured; those past the first 40 are in the data only.
        series: label -> one value for each name.
        unit: of the values.
        reference: a value to mark by a line.

    Returns:
        the figure.
    """
    shown = names[:_MOST]
    thick = 0.8 / len(series)
    drawing = Drawing(height=0.9 + 0.26 * max(1.0, 0.75 * len(series)) * len(shown))
    axes = drawing.axes
    for number, (text, values) in enumerate(series.items()):
        places = [row + (number - (len(series) - 1) / 2) * thick for row in range(len(shown))]
        color = SERIES[number % len(SERIES)]
        drawn = axes.barh(places, values[: len(shown)], thick * 0.92, color=color, label=text)
        for bar, what, value in zip(drawn, shown, values, strict=False):
            drawing.mark(bar, f"{what}, {text}: {value:.4g}{unit}")
            if len(series) == 1:
                axes.annotate(
                    f"{value:.4g}", (value, bar.get_y() + bar.get_height() / 2), (3, 0),
                    textcoords="offset points", va="center", fontsize=9,
                )
    if reference is not None:
        drawing.mark(axes.axvline(reference, color=SERIES[0], linestyle=":"), f"{reference:.4g}")
    axes.set_yticks(range(len(shown)), [label(each) for each in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12 if len(series) == 1 else 0.05, y=0.02)
    axes.set_xlabel(unit.strip())
    axes.grid(axis="x")
    if len(series) > 1:
        axes.legend(loc="lower right")
    rows = [
        (each, *(rounded(values[row]) for values in series.values()))
        for row, each in enumerate(names)
    ]
    return Figure(
        name=name,
        title=title,
        caption=caption + _left_out(len(names) - len(shown)),
        alt=_told(shown, series, unit),
        svg=drawing.to_svg(name),
        data=Data(("name", *series), tuple(rows)),
    )


def _left_out(count: int) -> str:
    return f" {count} more are in the data." if count else ""


def _told(names: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    parts = []
    for text, values in series.items():
        most = max(range(len(names)), key=values.__getitem__)
        parts.append(f"{text}: largest {values[most]:.4g}{unit} ({names[most]}).")
    return " ".join(parts)
