"""Adapters with sites of every layout, and the dense sums they are held against."""

import torch
from torch import Tensor

from laws.cases import truth
from tether import combine
from tether.provenance import Provenance
from tether.value import Adapter, Factors, LayerAdapter, Layout

LAYOUTS = {
    "linear": Layout("linear", (12, 9)),
    "wide": Layout("transposed", (21, 5)),
    "tokens": Layout("embedding", (17, 6)),
    "conv": Layout("conv", (7, 2, 3, 3)),
    "row": Layout("linear", (1, 8)),
}


def layer(
    layout: Layout,
    generator: torch.Generator,
    rank: int = 2,
    anchored: bool = True,
    scaling: float = 0.7,
    dtype: torch.dtype = torch.float32,
) -> LayerAdapter:
    out_features, in_features = layout.out_features, layout.in_features

    def draw(size: float) -> Factors:
        a = size * torch.randn(rank, in_features, generator=generator)
        return Factors(a, size * torch.randn(out_features, rank, generator=generator)).to(dtype)

    return LayerAdapter(draw(0.1), draw(1.0) if anchored else None, scaling, layout)


def adapter(seed: int = 0, sites: tuple[str, ...] = tuple(LAYOUTS), **settings) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {name: layer(LAYOUTS[name], generator, **settings) for name in sites},
        Provenance("pissa", base_model="base"),
    )


def exact_sum(adapters, weights) -> dict[str, Tensor]:
    """Σ wᵢ·ΔWᵢ of every site, dense, in float64."""
    total: dict[str, Tensor] = {}
    for value, weight in zip(adapters, weights, strict=True):
        for site, here in value.layers.items():
            total[site] = total.get(site, 0) + weight * truth(here)
    return total


def changes(result: combine.Combined) -> dict[str, Tensor]:
    return {site: truth(here) for site, here in result.adapter.layers.items()}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for site, value in wanted.items():
        assert float((found[site] - value).norm()) <= tolerance * float(value.norm()), site
