"""A table of shades: sites × layers of one measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tether.report.figures.drawing import Data, Drawing, Figure, label, rounded
from tether.report.figures.svg import ACCENT, LINE
from tether.report.values import SiteStats

_FAINTEST = 0.06  # so that a cell of the lowest value can still be seen


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        row: its name.
        column: its name.
        value: shown as a shade, or None where it is not known.
        name: what is measured.
        opens: index of the choice that a click makes; None for none.
    """

    row: str
    column: str
    value: float | None
    name: str
    opens: int | None = None


def heatmap(
    name: str, title: str, caption: str, cells: Sequence[Cell], show: Callable[[float], str] = str
) -> Figure:
    """Draw cells; the stronger the colour, the larger.

    Args:
        name: of the figure.
        title: of the figure.
        caption: how to read it.
        cells: in the order in which rows and columns appear; one at least has a value.
        show: a value as text.

    Returns:
        the figure.
    """
    rows = list(dict.fromkeys(cell.row for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in cells))
    known = [cell.value for cell in cells if cell.value is not None]
    most = max(known)
    longest = max(len(label(row, 32)) for row in rows)
    width = max(4.2, 0.26 * len(columns) + 0.085 * longest + 0.5)
    with Drawing(width=width, height=0.9 + 0.3 * len(rows)) as drawing:
        for cell in cells:
            _draw(drawing, cell, (rows.index(cell.row), columns.index(cell.column)), most, show)
        axes = drawing.axes
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label(row, 32) for row in rows])
        every = max(1, round(len(columns) / 16))
        axes.set_xticks(range(0, len(columns), every), columns[::every])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer")
        picture = drawing.to_svg(name)
    strongest = max(cells, key=lambda cell: cell.value or 0.0)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        alt=f"{len(rows)} kinds of sites by {len(columns)} layers. From {show(min(known))} to "
        f"{show(most)} ({strongest.name}).",
        svg=picture,
        data=Data(("site", "value"), tuple((cell.name, rounded(cell.value)) for cell in cells)),
        wide=len(columns) > 12,
    )


def site_heatmap(
    name: str,
    title: str,
    caption: str,
    sites: Sequence[SiteStats],
    measure: Callable[[SiteStats], float | None],
    show: Callable[[float], str],
) -> Figure:
    """Draw one measure of all sites, by kind and layer.

    Args:
        name: of the figure.
        title: of the figure.
        caption: how to read it.
        sites: whose places are the choices of the page.
        measure: of a site; known of one at least.
        show: a value as text.

    Returns:
        the figure.
    """
    order = sorted(range(len(sites)), key=lambda i: (sites[i].layer is None, sites[i].layer or 0))
    cells = [
        Cell(
            sites[i].kind,
            "–" if sites[i].layer is None else str(sites[i].layer),
            measure(sites[i]),
            sites[i].path,
            i,
        )
        for i in order
    ]
    return heatmap(name, title, caption, cells, show)


def _draw(
    drawing: Drawing,
    cell: Cell,
    at: tuple[int, int],
    most: float,
    show: Callable[[float], str],
) -> None:
    from matplotlib.patches import Rectangle

    row, column = at
    place = (column - 0.46, row - 0.46)
    if cell.value is None:
        patch = Rectangle(place, 0.92, 0.92, facecolor="none", edgecolor=LINE, linewidth=0.6)
    else:
        share = max(0.0, cell.value / most) if most > 0 else 0.0
        alpha = _FAINTEST + (1 - _FAINTEST) * share
        patch = Rectangle(place, 0.92, 0.92, facecolor=ACCENT, alpha=alpha, edgecolor="none")
    drawing.axes.add_patch(patch)
    told = "not known" if cell.value is None else show(cell.value)
    drawing.mark(patch, f"{cell.name}: {told}", opens=cell.opens)
