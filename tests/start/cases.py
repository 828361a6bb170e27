"""Models whose sites are cached, and all that an adapter says, to be compared bit for bit."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tether
from laws.cases import bits
from tether.methods import Context
from tether.methods.pissa import PiSSA
from tether.start import Found, Search, find
from tether.value import Adapter, Factors

SHAPES = ((130, 128), (128, 160), (300, 280), (12, 16))  # the last is too small to be cached

CACHED = 3  # of these sites


def stack(shapes: tuple[tuple[int, int], ...] = SHAPES, seed: int = 0) -> nn.Module:
    """Linear layers with (out, in) of each; spectra that fall, as those of trained weights do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.ModuleList(nn.Linear(inside, outside) for outside, inside in shapes)
        for layer in layers:
            falling = torch.arange(1, layer.in_features + 1) ** -0.7
            layer.weight.data = layer.weight.data * falling
    return layers


def llama(**settings: object) -> transformers.LlamaForCausalLM:
    """Two layers of ten cached sites and four small ones; the same every time."""
    values = {
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | settings)).eval()


def found(config: tether.LoraConfig, seed: int = 0, **search: object) -> Found:
    """The start of `stack`."""
    return find(stack(seed=seed), config, Search(**search))


def config(init: object = "pissa", rank: int = 5, **settings: object) -> tether.LoraConfig:
    """A configuration, PiSSA of rank 5 unless told otherwise."""
    return tether.LoraConfig(init=init, rank=rank, **settings)


def tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the sites, by name."""
    for path, layer in adapter.layers.items():
        pairs = {"trainable": layer.trainable, "anchor": layer.anchor}
        for name, pair in pairs.items():
            if pair is not None:
                yield from ((f"{path} {name} A", pair.A), (f"{path} {name} B", pair.B))
        if layer.magnitude is not None:
            yield f"{path} moved", layer.magnitude.trainable
            yield f"{path} lengths", layer.magnitude.anchor


def everything(adapter: Adapter) -> dict[str, Any]:
    """All that an adapter says; two of them are equal if it is the same, bit for bit."""
    return {
        "tensors": {name: bits(tensor) for name, tensor in tensors(adapter)},
        "provenance": adapter.provenance,
        "norms": {p: f.norm for p, f in adapter.provenance.fingerprints.items()},
        "config": dict(adapter.config),
        "targets": adapter.targets,
        "excluded": adapter.excluded,
        "scalings": {path: layer.scaling for path, layer in adapter.layers.items()},
        "layouts": {path: layer.layout for path, layer in adapter.layers.items()},
    }


@contextmanager
def counting(method: type[Any] = PiSSA) -> Iterator[Counter[str]]:
    """How often each site's start is computed within the block."""
    calls: Counter[str] = Counter()
    start: Callable[..., Factors] = method.start

    def counted(self: Any, weight: Tensor, rank: int, context: Context) -> Factors:
        calls[context.path] += 1
        return start(self, weight, rank, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "start", counted)
        yield calls
