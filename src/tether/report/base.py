"""What the weight itself tells of an adapter's sites: its spectrum, overlaps, intruder dimensions.

Read from a model folder, one weight at a time; each is decomposed in float64, which takes time, so
that large adapters are measured at some of their sites only.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tether import algebra
from tether.checkpoint import Checkpoint
from tether.fingerprints import check_fingerprint
from tether.merged import plan
from tether.report.values import BaseStats, SiteStats
from tether.value import Adapter, LayerAdapter, Progress

INTRUDER_TOP = 10  # leading singular vectors that are looked at
INTRUDER_COSINE = 0.5  # below this with all of W's, one is an intruder


def with_base(
    adapter: Adapter,
    sites: Sequence[SiteStats],
    base: Checkpoint,
    limit: int,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[SiteStats]:
    """Add what the weights tell.

    Args:
        adapter: made on `base`.
        sites: of the adapter.
        base: its base model.
        limit: most sites to measure, spread evenly over kinds and layers; 0 for all.
        verify: check that each weight read is the one the adapter was made on.
        progress: called after each weight.

    Returns:
        the sites, those that were measured with their `base`.

    Raises:
        BaseMismatchError: the base is another model.
        TetherError: as of `tether.merged`, where the base lacks a weight or is quantised.
    """
    edits = plan.make(base, adapter).edits.values()
    sources = {edit.path: edit.source for edit in edits}
    chosen, found = _choose(sites, limit), list(sites)
    for done, place in enumerate(chosen, start=1):
        path = sites[place].path
        layer, weight = adapter.layers[path], base.tensor(sources[path])
        expected = adapter.provenance.fingerprints.get(path)
        if verify and expected is not None:
            check_fingerprint(path, weight, expected)
        stats = measure(layer.layout.matrix(weight), layer)
        norm = float(torch.linalg.vector_norm(weight.double()))
        found[place] = replace(found[place], base=stats, weight=norm)
        if progress is not None:
            progress(done, len(chosen))
    return found


@torch.no_grad()
def measure(weight: Tensor, layer: LayerAdapter) -> BaseStats:
    """Measure one site.

    Args:
        weight: (out, in), any floating dtype; read, never written.
        layer: its adapter.

    Returns:
        the measures.
    """
    matrix = weight.double()
    change = algebra.delta(layer, weight).double()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    total = float(change.square().sum())
    sides = ((u.T @ change).square().sum(1) + (change @ vt.T).square().sum(0)) / 2
    shares = sides / total if total > 0 else torch.zeros_like(s)
    count = min(layer.rank, len(s))
    rows, columns = matrix.shape
    return BaseStats(
        spectrum=tuple(s.tolist()),
        count=count,
        top=float(shares[:count].sum()),
        bottom=float(shares[len(s) - count :].sum()),
        expected=count * (1 / rows + 1 / columns) / 2,
        intruders=_intruders(u, matrix + change),
    )


def _intruders(known: Tensor, moved: Tensor) -> int:
    count = min(INTRUDER_TOP, *moved.shape)
    cosines = (known.T @ _leading(moved, count)).abs()
    return int((cosines.amax(dim=0) < INTRUDER_COSINE).sum())


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors, by the smaller Gram matrix: good enough for a cosine."""
    if matrix.shape[0] <= matrix.shape[1]:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1][:, -count:]
    else:
        vectors = matrix @ torch.linalg.eigh(matrix.T @ matrix)[1][:, -count:]
    return torch.nn.functional.normalize(vectors, dim=0)


def _choose(sites: Sequence[SiteStats], limit: int) -> list[int]:
    """Places of at most so many sites: of every kind in turn, each at other depths."""
    if limit == 0 or limit >= len(sites):
        return list(range(len(sites)))
    kinds: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        kinds.setdefault(site.kind, []).append(place)
    chosen = []
    for number, places in enumerate(kinds.values()):
        share = limit // len(kinds) + (number < limit % len(kinds))
        count = min(share, len(places))
        # The golden ratio: however many kinds there are, their depths lie far apart.
        shift = number * 0.618 % 1
        chosen += [places[int((step + shift) * len(places) / count)] for step in range(count)]
    return sorted(chosen)
