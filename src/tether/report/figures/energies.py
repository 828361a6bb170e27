"""How much of each adapter's ΔW a smaller rank would keep, all sites together."""

from collections.abc import Mapping, Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES

_DOTS = 40  # of one curve, at most


def energies(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw one curve for each adapter.

    Args:
        curves: name -> share of |ΔW|² of all sites that is left where each is cut to rank 1, 2, ….

    Returns:
        the figure.
    """
    longest = max(map(len, curves.values()))
    with Drawing(height=3.4) as drawing:
        axes = drawing.axes
        for number, (name, shares) in enumerate(curves.items()):
            color = SERIES[number % len(SERIES)]
            ranks = range(1, len(shares) + 1)
            # Equal curves lie on each other: each later one has larger gaps.
            style = "-" if number == 0 else (0, (5, 2 + 2 * number))
            (line,) = axes.plot(ranks, shares, color=color, linestyle=style, label=name)
            drawing.mark(line, name)
            chosen = ranks[:: max(1, len(shares) // _DOTS)]
            dots = axes.scatter(
                chosen, [shares[r - 1] for r in chosen], s=12, color=color, zorder=3
            )
            drawing.mark(dots, [f"{name}, rank {r}: {shares[r - 1]:.2%}" for r in chosen])
        axes.set_ylim(0, 1.03)
        axes.set_xlim(left=0)
        axes.set_xlabel("rank kept at each site")
        axes.set_ylabel("share of |ΔW|²")
        axes.grid(axis="y")
        drawing.legend()
        picture = drawing.to_svg("energies")
    return Figure(
        name="energies",
        title="Energy of ΔW by rank",
        caption="The share of |ΔW|² of all sites that is left where each site is cut to a rank: a "
        "share of 1 − e² means a relative error of e.",
        alt=" ".join(_told(name, shares) for name, shares in curves.items()),
        svg=picture,
        data=Data(
            ("adapter", *map(str, range(1, longest + 1))),
            tuple((name, *map(rounded, shares)) for name, shares in curves.items()),
        ),
    )


def _told(name: str, shares: Sequence[float]) -> str:
    if not any(shares):
        return f"{name}: nothing has changed."
    # A margin for rounding: the last value is 1 but for its last digits.
    rank = next(r for r, share in enumerate(shares, start=1) if share >= 0.99 - 1e-12)
    return f"{name}: rank {rank} holds 99%."
