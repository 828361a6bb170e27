"""What a comparison means, in a sentence."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tether.compare.values import Comparison, Difference

# Largest relative error of any site, or parameter trained whole, that rounding explains: twice
# that of one value, for two factors; in float32 more, for the sums on the way.
ROUNDING = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-8}
_MARGIN = 1e-2  # relative, of an error that is said to be the smallest possible


def verdict(comparison: "Comparison") -> str:
    """Say what two adapters are to each other.

    Args:
        comparison: of them.

    Returns:
        "the same within float32 rounding: …", "the same up to bfloat16 rounding: …", "a reduction
        to 8 directions a site, as near as so few can be: …" or "different: …", with the numbers.
    """
    all_of = [*comparison.sites.values(), *comparison.wholes.values()]
    alone = len(comparison.only_a) + len(comparison.only_b)
    measured = _measured(comparison)
    if not alone:
        worst = max(each.rounding for each in all_of)
        for form, limit in ROUNDING.items():
            if worst <= limit:
                how = "within" if form == "float32" else "up to"
                return f"the same {how} {form} rounding: {measured}"
        if _reduced(comparison):
            most = max(site.directions_b for site in comparison.sites.values())
            return f"a reduction to {most} directions a site, as near as so few can be: {measured}"
    parts = [measured] if comparison.shared else []
    for which, names in (("first", comparison.only_a), ("second", comparison.only_b)):
        parts += [f"{len(names)} only in the {which}"] if names else []
    return "different: " + "; ".join(parts)


def _reduced(comparison: "Comparison") -> bool:
    """Whether no change of so few directions would be nearer, at any site."""
    if not _rounded(comparison.wholes.values()):
        return False
    sites = comparison.sites.values()
    # All of a change left out is no approximation of it.
    if any(site.directions_a > 0 and site.directions_b == 0 for site in sites):
        return False
    return any(site.least > ROUNDING["bfloat16"] for site in sites) and all(
        site.error <= math.hypot(site.least, ROUNDING["bfloat16"]) * (1 + _MARGIN) for site in sites
    )


def _rounded(differences: "Iterable[Difference]") -> bool:
    return all(each.rounding <= ROUNDING["bfloat16"] for each in differences)


def _measured(comparison: "Comparison") -> str:
    sites, path = comparison.sites, comparison.worst
    text = f"relative error {_shown(comparison.error)}"
    if len(sites) > 1:
        text += f", at most {_shown(sites[path].error)} ({path})"
    if comparison.cosine is not None:
        text += f", cosine {comparison.cosine:.4f}"
    return text


def _shown(error: float) -> str:
    return f"{error:.2e}" if error < 1e-3 else f"{error:.3g}"
