"""What `compare` measured, as values."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from tether.compare import verdict as words
from tether.compare.subspace import Overlap
from tether.value import Json


@dataclass(frozen=True, slots=True)
class Difference:
    """One change in both adapters: of a site's weight, or of a parameter trained whole.

    Attributes:
        norm_a: |Δa|_F.
        norm_b: |Δb|_F.
        error: |Δa − Δb|_F / |Δa|_F; 0 if both are zero, inf if only Δa is.
        cosine: <Δa, Δb> / (|Δa|·|Δb|), in [−1, 1]; None where one of them is zero.
        rounding: what rounding is measured by: of a site the error; of a parameter trained whole
            |Δa − Δb|_F beside the larger norm of what is stored, its value or what it moved by.
    """

    norm_a: float
    norm_b: float
    error: float
    cosine: float | None
    rounding: float


@dataclass(frozen=True, slots=True)
class SiteDifference(Difference):
    """The changes of one site.

    Attributes:
        rank_a: of the first one's trained factors; 0 where it lacks the site.
        rank_b: of the second's.
        directions_a: singular values of Δa above 1e-5 of the largest.
        directions_b: of Δb.
        overlap: of their leading directions; None where one of them is zero.
        least: the smallest error that any change of `directions_b` directions would have.
    """

    rank_a: int
    rank_b: int
    directions_a: int
    directions_b: int
    overlap: Overlap | None
    least: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` measured, in float64.

    Attributes:
        sites: site path -> difference of its ΔW (with DoRA: of its low-rank part).
        wholes: name of a bias, a DoRA magnitude or a parameter of a module trained whole -> the
            difference of the two displacements.
        only_a: sites and names that only the first adapter has.
        only_b: sites and names that only the second has.
        bytes_a: what the tensors of the first adapter take, anchors included.
        bytes_b: of the second.
    """

    sites: Mapping[str, SiteDifference]
    wholes: Mapping[str, Difference]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    bytes_a: int
    bytes_b: int

    @property
    def shared(self) -> tuple[str, ...]:
        """The sites that both have."""
        return tuple(path for path, site in self.sites.items() if site.rank_a and site.rank_b)

    @property
    def worst(self) -> str:
        """The site with the largest relative error."""
        return max(self.sites, key=lambda path: self.sites[path].error)

    @property
    def norm_a(self) -> float:
        """|Δa|_F of all sites taken together."""
        return math.hypot(*(site.norm_a for site in self.sites.values()))

    @property
    def norm_b(self) -> float:
        """|Δb|_F of all sites taken together."""
        return math.hypot(*(site.norm_b for site in self.sites.values()))

    @property
    def error(self) -> float:
        """|Δa − Δb|_F / |Δa|_F of all sites taken together; `wholes` are not in it."""
        apart = math.hypot(*(distance(site) for site in self.sites.values()))
        return ratio(apart, self.norm_a)

    @property
    def overlap(self) -> float | None:
        """Mean overlap of the sites, weighted by |Δa|²; None where no site has one."""
        return self._weighted(lambda overlap: overlap.mean)

    @property
    def chance(self) -> float | None:
        """What `overlap` would be for random directions."""
        return self._weighted(lambda overlap: overlap.chance)

    def _weighted(self, measure: Callable[[Overlap], float]) -> float | None:
        found = [(s.norm_a / self.norm_a, s.overlap) for s in self.sites.values() if s.overlap]
        total = math.fsum(share**2 for share, _ in found)
        if total == 0:
            return None
        return math.fsum(share**2 / total * measure(overlap) for share, overlap in found)

    @property
    def least(self) -> float:
        """The smallest `error` that changes of the second's directions would have."""
        return ratio(math.hypot(*(s.least * s.norm_a for s in self.sites.values())), self.norm_a)

    @property
    def cosine(self) -> float | None:
        """<Δa, Δb> / (|Δa|·|Δb|) of all sites taken together; None where one of them is zero."""
        a, b = self.norm_a, self.norm_b
        if a == 0 or b == 0:
            return None
        shares = ((s.cosine or 0.0) * (s.norm_a / a) * (s.norm_b / b) for s in self.sites.values())
        return max(-1.0, min(1.0, math.fsum(shares)))

    @property
    def verdict(self) -> str:
        """What the two are to each other, with the numbers.

        "the same within float32 rounding: …", "the same up to bfloat16 rounding: …", "a reduction
        to 8 directions a site, as near as so few can be: …" or "different: …".
        """
        return words.verdict(self)

    def to_dict(self) -> dict[str, Json]:
        """The comparison as JSON values.

        Returns:
            verdict; norm_a, norm_b, error, cosine, overlap, chance and least of all sites; of each
            site and whole its attributes; only_a, only_b, bytes_a, bytes_b. An infinite number is
            None.
        """
        return {
            "verdict": self.verdict,
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "error": _finite(self.error),
            "cosine": self.cosine,
            "overlap": self.overlap,
            "chance": self.chance,
            "least": self.least,
            "sites": {path: _json(site) for path, site in self.sites.items()},
            "wholes": {name: _json(whole) for name, whole in self.wholes.items()},
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "bytes_a": self.bytes_a,
            "bytes_b": self.bytes_b,
        }

    def __str__(self) -> str:
        """A few lines for a person: all sites together, the one furthest apart, the rest."""
        overall = Difference(self.norm_a, self.norm_b, self.error, self.cosine, self.error)
        lines = [f"{len(self.sites)} sites: {_line(overall)}"]
        for kind, differences in (("site", self.sites), ("trained whole", self.wholes)):
            if differences:
                worst = max(differences, key=lambda name: differences[name].error)
                lines.append(f"furthest apart, {kind}: {worst}: {_line(differences[worst])}")
        for which, names in (("first", self.only_a), ("second", self.only_b)):
            if names:
                more = f" and {len(names) - 3} others" if len(names) > 3 else ""
                lines.append(f"only in the {which}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


def distance(difference: Difference) -> float:
    """|Δa − Δb|_F.

    Args:
        difference: of two changes.

    Returns:
        their distance.
    """
    if difference.norm_a == 0:
        return difference.norm_b
    return difference.error * difference.norm_a


def ratio(apart: float, size: float) -> float:
    """A distance beside a norm.

    Args:
        apart: 0 or more.
        size: 0 or more.

    Returns:
        apart / size; 0 if both are zero, inf if only the norm is.
    """
    if size == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / size


def _json(difference: Difference) -> dict[str, Json]:
    values: dict[str, Json] = asdict(difference)
    return values | {n: _finite(v) for n, v in values.items() if isinstance(v, float)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(difference: Difference) -> str:
    cosine = "none" if difference.cosine is None else f"{difference.cosine:.6f}"
    return (
        f"|ΔW| {difference.norm_a:.4g} and {difference.norm_b:.4g}, relative error "
        f"{difference.error:.2e}, cosine {cosine}"
    )
