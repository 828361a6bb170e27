"""Values over the steps of a run: losses, learning rate, drift."""

from collections.abc import Mapping, Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES

_MOST_POINTS = 400  # drawn of one series; the data has all
_DOTTED = 60  # series of at most this many points show each as a dot


def curves(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    unit: str = "",
    across: str = "step",
    log: bool = False,
    zero: bool = False,
) -> Figure:
    """Draw series over a common axis.

    Args:
        name: of the figure.
        title: of the figure.
        caption: how to read it.
        series: label -> (x, y) pairs, x ascending.
        unit: of y.
        across: what x counts.
        log: whether y is logarithmic; values of 0 are then left out.
        zero: whether the axis of y begins at 0.

    Returns:
        the figure.
    """
    with Drawing() as drawing:
        for number, (label, points) in enumerate(series.items()):
            shown = _thinned([(x, y) for x, y in points if y > 0 or not log])
            titles = [f"{label}, {across} {x:g}: {y:.5g}{unit}" for x, y in shown]
            _draw(drawing, label, shown, titles, SERIES[number % len(SERIES)])
        axes = drawing.axes
        if log:
            drawing.log_scale("y")
        _scale(drawing, [point for points in series.values() for point in points], zero)
        axes.set_xlabel(across)
        axes.set_ylabel(unit.strip())
        axes.grid(axis="y")
        if len(series) > 1:
            drawing.legend()
        picture = drawing.to_svg(name)
    rows = [(label, x, rounded(y)) for label, points in series.items() for x, y in points]
    return Figure(
        name=name,
        title=title,
        caption=caption,
        alt=" ".join(_told(label, points, across, unit) for label, points in series.items()),
        svg=picture,
        data=Data(("series", across, "value"), tuple(rows)),
    )


def _scale(drawing: Drawing, points: Sequence[tuple[float, float]], zero: bool) -> None:
    """No half steps below the axis, and room for the highest dot."""
    if all(float(x).is_integer() for x, _ in points):
        drawing.axes.xaxis.get_major_locator().set_params(integer=True)
    if zero:
        drawing.axes.set_ylim(0, 1.05 * max((y for _, y in points), default=0) or 1)


def _draw(
    drawing: Drawing,
    label: str,
    points: list[tuple[float, float]],
    titles: list[str],
    color: str,
) -> None:
    x, y = [x for x, _ in points], [y for _, y in points]
    (line,) = drawing.axes.plot(x, y, color=color, label=label)
    drawing.mark(line, label)
    # Above the line, so that a pointer meets them first.
    size = 16 if len(points) <= _DOTTED else 5
    drawing.mark(drawing.axes.scatter(x, y, s=size, color=color, zorder=3), titles)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many of the points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    stride = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(place * stride)] for place in range(_MOST_POINTS)]


def _told(label: str, points: Sequence[tuple[float, float]], across: str, unit: str) -> str:
    (first, began), (last, ended) = points[0], points[-1]
    low = min(y for _, y in points)
    return (
        f"{label}: {began:.4g}{unit} at {across} {first:g}, {ended:.4g}{unit} at {across} "
        f"{last:g}, lowest {low:.4g}{unit}."
    )
