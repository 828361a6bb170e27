"""A model of one site of any kind, a norm and a head: all that DoRA, biases and modules touch."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tether
from laws.cases import bits, truth, wholes_of
from tether.value import LayerAdapter

WIDTH = 6
IDS = torch.arange(1, 9).view(2, 4)
# How to make the site, and the shape of its input; none for token numbers.
SITES = {
    "linear": (lambda: nn.Linear(5, WIDTH), (4, 5)),
    "linear-no-bias": (lambda: nn.Linear(5, WIDTH, bias=False), (2, 3, 5)),
    "conv1d-of-transformers": (lambda: Conv1D(WIDTH, 5), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, WIDTH, 3, padding=1), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, WIDTH, (2, 3), stride=(2, 1)), (2, 3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, WIDTH, 2), (2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(9, WIDTH), None),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(9, WIDTH, 0, embed_scale=2.5), None),
}
BIASED = [kind for kind in SITES if kind.startswith(("linear", "conv")) and "no-bias" not in kind]


class Net(nn.Module):
    """A site, a norm and a head, in that order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.site = SITES[kind][0]()
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
            for parameter in self.norm.parameters():
                nn.init.normal_(parameter)
        self.channels_first = isinstance(self.site, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        return self.head(self.norm(y.movedim(1, -1) if self.channels_first else y))


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor]:
    """The net and an input, the same in every call."""
    shape, generator = SITES[kind][1], torch.Generator().manual_seed(2)
    x = IDS if shape is None else torch.randn(shape, generator=generator).to(dtype)
    return Net(kind).to(dtype), x


def combinations(kind: str) -> Iterator[dict[str, object]]:
    """Every way to train more than the factors that this model has something for."""
    saved = ((), ("norm",), ("head",), ("norm", "head"))
    for use_dora, bias, names in product((False, True), ("none", "lora_only", "all"), saved):
        no_bias = bias == "lora_only" or (bias == "all" and len(names) == 2)
        if not (no_bias and kind not in BIASED):
            yield {"use_dora": use_dora, "bias": bias, "modules_to_save": names}


def config(**settings: object) -> tether.LoraConfig:
    """Rank 2 on the site, scaled by 3/2."""
    return tether.LoraConfig(**{"rank": 2, "alpha": 3, "target_modules": "site"} | settings)


def moved(handle: tether.Handle, size: float = 0.1, seed: int = 3) -> tether.Handle:
    """Stand in for training: move all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return handle


def dora_weight(layer: LayerAdapter, weight: Tensor) -> Tensor:
    """m·(W + ΔW)/|W + ΔW| in float64, in the weight's own shape; W + ΔW without a magnitude."""
    changed = layer.layout.matrix(weight.detach().double()) + truth(layer)
    if layer.magnitude is not None:
        lengths = changed.norm(dim=1, keepdim=True)
        changed = layer.magnitude.current.double()[:, None] * changed / lengths
    return layer.layout.stored(changed)


def changed_state(model: nn.Module, adapter: tether.Adapter) -> dict[str, Tensor]:
    """Every parameter of the base that an adapter changes, as it says, in float64."""
    own = dict(model.named_parameters(remove_duplicate=False))
    found = {
        f"{path}.weight": dora_weight(layer, own[f"{path}.weight"])
        for path, layer in adapter.layers.items()
    }
    for name, value in adapter.trained_whole:
        assert value.anchor is not None
        found[name] = own[name].detach().double() + value.trainable.double()
    return found


def whole_bits(adapter: tether.Adapter) -> dict[str, object]:
    """The same as values that can be compared."""
    return {
        name: (
            value.trainable.dtype,
            bits(value.trainable),
            None if value.anchor is None else bits(value.anchor),
        )
        for name, value in wholes_of(adapter).items()
    }
