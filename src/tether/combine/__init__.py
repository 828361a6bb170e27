"""combine: several adapters of one base -> one plain adapter. Pure functions on values.

| | |
|---|---|
| `cat` | Σ wᵢ·ΔWᵢ, exact; the factors side by side |
| `linear` | Σ wᵢ·ΔWᵢ, exact, at the smallest rank that holds it |
| `svd` | the best approximation of Σ wᵢ·ΔWᵢ of a rank, or within a tolerance |
| `ties` | trim, elect a sign, average what agrees; cut to a rank |
| `dare` | drop at random and rescale, then a sum or TIES; cut to a rank |
"""

from tether.combine.build import Combined, CombinedSite
from tether.combine.dare import dare
from tether.combine.exact import cat, linear, svd
from tether.combine.ties import ties

__all__ = ["Combined", "CombinedSite", "cat", "dare", "linear", "svd", "ties"]
