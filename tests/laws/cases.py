"""What the laws are tested over: every method, three dtypes, eight families of weights."""

import dataclasses
import operator
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tether
from tether import methods
from tether.value import Trained

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1e-2, 1e-4, 1e-3, 1e-1, 1.0)  # relative to the start; the first is tried first
PROFILE = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
DRAWN = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rank": st.integers(0, 23),
        "alpha": st.sampled_from((0.3, 1.0, 16.0)),
        "use_rslora": st.sampled_from((True, False)),
        "dropout": st.sampled_from((0.5, 0.0)),
        "size": st.sampled_from(SIZES),
    }
)
DRAWN_WITH_WHOLES = st.builds(
    operator.or_,
    DRAWN,
    st.fixed_dictionaries(
        {
            "use_dora": st.sampled_from((True, False)),
            "bias": st.sampled_from(("lora_only", "none", "all")),
        }
    ),
)


def _signed_zeros(g: torch.Generator) -> Tensor:
    return torch.copysign(torch.zeros(9, 6), torch.randn(9, 6, generator=g))


FAMILIES = {
    "tall": lambda g: torch.randn(24, 7, generator=g),
    "wide": lambda g: torch.randn(7, 24, generator=g),
    "square": lambda g: torch.randn(12, 12, generator=g),
    "1xn": lambda g: torch.randn(1, 17, generator=g),
    "zero": _signed_zeros,
    # Equal rows: of rank 3 in every dtype.
    "rank-deficient": lambda g: torch.randn(3, 10, generator=g)[torch.arange(14) % 3],
    "flat": lambda g: torch.linalg.qr(torch.randn(12, 8, generator=g))[0],
    "transposed-view": lambda g: torch.randn(9, 16, generator=g).T,
}


class Bases(nn.Module):
    """A linear layer, its tied twin that no adapter names, and an embedding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.linear = nn.Linear(in_features, out_features, dtype=weight.dtype)
        self.twin = nn.Linear(in_features, out_features, bias=False)
        self.embedding = nn.Embedding(out_features, in_features)
        self.linear.weight = self.twin.weight = nn.Parameter(weight)
        self.embedding.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), self.twin(x), self.embedding(ids)


@dataclass(frozen=True)
class Case:
    """One example of the laws' common ground."""

    method: str
    dtype: torch.dtype
    family: str
    seed: int
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    size: float
    use_dora: bool = False
    bias: str = "none"

    def model(self) -> Bases:
        generator = torch.Generator().manual_seed(self.seed)
        weight = FAMILIES[self.family](generator).to(self.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Bases(weight)

    def batch(self) -> tuple[Tensor, Tensor]:
        rows, columns = FAMILIES[self.family](torch.Generator()).shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(5, columns, generator=generator).to(self.dtype), torch.arange(rows)

    def config(self, **changes: object) -> tether.LoraConfig:
        return tether.LoraConfig(
            **{
                "init": self.method,
                "rank": self.rank,
                "alpha": self.alpha,
                "use_rslora": self.use_rslora,
                "dropout": self.dropout,
                "target_modules": ["linear", "embedding"],
                "seed": self.seed,
                "use_dora": self.use_dora,
                "bias": self.bias,
            }
            | changes
        )

    def moved(self, adapter: tether.Adapter) -> tether.Adapter:
        """The adapter after a training of relative size `size`."""
        generator = torch.Generator().manual_seed(self.seed + 2)

        def move(moving: Tensor, start: Tensor) -> Tensor:
            typical = float(start.square().mean().sqrt())
            typical = typical if typical > 1e-6 else 1.0  # a start at zero, up to rounding
            return moving + self.size * typical * torch.randn(moving.shape, generator=generator)

        def moved_whole(value: Trained) -> Trained:
            return Trained(move(value.trainable, value.anchor), value.anchor)

        layers = {}
        for path, layer in adapter.layers.items():
            start = layer.trainable if layer.anchor is None else layer.anchor
            trainable = tether.Factors(
                move(layer.trainable.A, start.A), move(layer.trainable.B, start.B)
            )
            magnitude = layer.magnitude and moved_whole(layer.magnitude)
            layers[path] = dataclasses.replace(layer, trainable=trainable, magnitude=magnitude)
        biases = {path: moved_whole(bias) for path, bias in adapter.biases.items()}
        return dataclasses.replace(adapter, layers=layers, biases=biases)

    def trained(self, model: nn.Module, **settings: object) -> tether.Handle:
        """The moved adapter, attached."""
        adapter = self.moved(tether.init(model, self.config()))
        return tether.attach(model, adapter, **settings)


def law(examples: int = 2, wholes: bool = False, **fixed: object):
    """Run a test for every method, dtype and family, on drawn ranks, scalings and sizes.

    Args:
        examples: how many are drawn for each.
        wholes: whether to draw DoRA and trained biases too.
        **fixed: fields of Case that are not drawn.
    """

    def decorate(test):
        @pytest.mark.parametrize("family", FAMILIES)
        @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
        @pytest.mark.parametrize("method", methods.names())
        @settings(PROFILE, max_examples=examples)
        @given(drawn=DRAWN_WITH_WHOLES if wholes else DRAWN)
        def run(method, dtype, family, drawn):
            smaller = min(FAMILIES[family](torch.Generator()).shape)
            drawn = drawn | {"rank": 1 + (1 + drawn["rank"]) % smaller} | fixed
            test(Case(method, dtype, family, **drawn))

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def bits(tensor: Tensor) -> bytes:
    """A tensor's values, exactly: tells −0.0 from 0.0, and equals itself where it holds NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything about a model and the random generators that tether must not change."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    return {
        "random": (bits(torch.get_rng_state()), random.getstate(), _numpy_state()),
        "keys": list(model.state_dict()),
        **{
            name: (
                bits(t),
                t._version,
                t.requires_grad,
                t.stride(),
                None if t.grad is None else bits(t.grad),
            )
            for name, t in tensors.items()
        },
        **{
            f"module {name}": (type(m), m.training, list(vars(m)), len(m._forward_hooks))
            for name, m in model.named_modules()
        },
    }


def _numpy_state() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def factors_of(adapter: tether.Adapter) -> dict[str, Tensor]:
    """Every tensor of an adapter, by name."""
    found = {
        f"{path}.{kind}.{name}": getattr(factors, name)
        for path, layer in adapter.layers.items()
        for kind, factors in (("trainable", layer.trainable), ("anchor", layer.anchor))
        if factors is not None
        for name in ("A", "B")
    }
    for name, value in wholes_of(adapter).items():
        found[f"{name}.trainable"] = value.trainable
        if value.anchor is not None:
            found[f"{name}.anchor"] = value.anchor
    return found


def wholes_of(adapter: tether.Adapter) -> dict[str, Trained]:
    """What is trained whole: magnitudes, biases and parameters of modules, by name."""
    magnitudes = {
        f"{path}.magnitude": layer.magnitude
        for path, layer in adapter.layers.items()
        if layer.magnitude is not None
    }
    return magnitudes | dict(adapter.trained_whole)


def truth(layer: tether.LayerAdapter) -> Tensor:
    """ΔW = s·(B·A − B0·A0) in float64, by its definition."""
    a, b = layer.trainable.A.double(), layer.trainable.B.double()
    if layer.anchor is None:
        return layer.scaling * (b @ a)
    a0, b0 = layer.anchor.A.double(), layer.anchor.B.double()
    return layer.scaling * ((b0 + b) @ (a0 + a) - b0 @ a0)
