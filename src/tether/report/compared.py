"""What the page, the table and the JSON of a comparison show: several adapters beside the first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tether import algebra, precision
from tether.compare import Comparison, compare
from tether.precision import Loss
from tether.training.behaviour import Behaviour
from tether.training.report import Reporter
from tether.value import Adapter

LETTERS = "ABCDEFGH"


@dataclass(frozen=True, slots=True)
class About:
    """One of the adapters.

    Attributes:
        name: as it is shown.
        form: "anchored" or "plain LoRA", and DoRA where a site has it.
        method: that chose its start.
        sites: how many.
        ranks: smallest and largest rank of the trained factors.
        bytes: on disk.
        losses: form of fewer bits -> what it costs.
        energy: share of |ΔW|² of all sites that is left where each is cut to rank 1, 2, ….
    """

    name: str
    form: str
    method: str
    sites: int
    ranks: tuple[int, int]
    bytes: int
    losses: Mapping[str, Loss]
    energy: tuple[float, ...]

    @property
    def rank(self) -> str:
        """The ranks in words."""
        low, high = self.ranks
        return str(low) if low == high else f"{low}–{high}"


@dataclass(frozen=True, slots=True)
class Compared:
    """Adapters by their letters, in order; A is the reference.

    Attributes:
        adapters: letter -> what it is.
        pairs: letter of every other one -> its comparison with A, whose numbers are relative to A.
        behaviour: on a base, by letters; None without one.
    """

    adapters: Mapping[str, About]
    pairs: Mapping[str, Comparison]
    behaviour: Behaviour | None = None

    def label(self, letter: str | None) -> str:
        """How an adapter is called in tables and pictures.

        Args:
            letter: of the adapter; None for the base.

        Returns:
            letter and name.
        """
        return "base alone" if letter is None else f"{letter}: {self.adapters[letter].name}"


def measure(
    adapters: Mapping[str, Adapter],
    sizes: Mapping[str, int],
    behaviour: Behaviour | None = None,
    reporter: Reporter | None = None,
) -> Compared:
    """Compare adapters with the first of them, from their factors alone.

    Args:
        adapters: name -> adapter, two to eight.
        sizes: name -> bytes on disk.
        behaviour: measured on a base, by letters.
        reporter: shows progress.

    Returns:
        the values.

    Raises:
        ShapeMismatchError: they are of different models.
        NonFiniteError: one holds NaN or Inf.
    """
    reporter = reporter or Reporter()
    (_, first), *others = adapters.items()
    letters = dict(zip(adapters, LETTERS, strict=False))
    pairs = {}
    for name, adapter in others:
        with reporter.task(f"Comparing {letters[name]} with A") as task:
            pairs[letters[name]] = compare(first, adapter, task)
    about = {}
    for name, adapter in adapters.items():
        with reporter.task(f"Rounding {letters[name]} to fewer bits") as task:
            losses = precision.losses(adapter, task)
        about[letters[name]] = _about(name, adapter, sizes[name], losses)
    return Compared(about, pairs, behaviour)


def _about(name: str, adapter: Adapter, size: int, losses: Mapping[str, Loss]) -> About:
    layers = adapter.layers.values()
    form = "anchored" if adapter.anchored else "plain LoRA"
    ranks = [layer.rank for layer in layers]
    return About(
        name=name,
        form=form + (", DoRA" if any(layer.magnitude is not None for layer in layers) else ""),
        method=adapter.provenance.method,
        sites=len(layers),
        ranks=(min(ranks), max(ranks)),
        bytes=size,
        losses=losses,
        energy=energy(adapter),
    )


def energy(adapter: Adapter) -> tuple[float, ...]:
    """The share of |ΔW|² of all sites that is left where each is cut to a rank.

    Args:
        adapter: anchored or plain.

    Returns:
        of rank 1, 2, … to that of the plain form, ending with 1; zeros where nothing has changed.
    """
    values = [algebra.singular_values(layer) for layer in adapter.layers.values()]
    squares = torch.zeros(max(map(len, values)), dtype=torch.float64)
    for each in values:
        squares[: len(each)] += each.cpu().square()
    total = math.fsum(squares.tolist())
    return tuple((squares.cumsum(0) / (total or 1.0)).clamp(max=1.0).tolist())
