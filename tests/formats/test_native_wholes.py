"""The native file with magnitudes, biases and whole modules: exact; and files of version 1."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open

import tether
from attacks.forge import parts, seal, small_adapter
from laws.cases import bits, factors_of, wholes_of
from tether.errors import NonFiniteError
from tether.value import Adapter, Trained
from whole_model import SITES, combinations, config, make, moved

SITE = "layers.0.up"


def anchored(*shape: int, dtype: torch.dtype = torch.float32) -> Trained:
    return Trained(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


def whole(*shape: int) -> Trained:
    return Trained(torch.randn(shape), None)


def with_wholes() -> Adapter:
    """Every kind of part, with and without an anchor."""
    adapter = small_adapter()
    layers = {
        SITE: dataclasses.replace(adapter.layers[SITE], magnitude=anchored(3)),
        "head": dataclasses.replace(adapter.layers["head"], magnitude=whole(2)),
    }
    return dataclasses.replace(
        adapter,
        layers=layers,
        biases={SITE: anchored(3), "norm": whole(4)},
        modules={
            "score": {"weight": anchored(2, 3), "bias": whole(2)},
            "pooler": {"dense.weight": whole(1, 2, 1, 1), "scale": anchored()},
        },
    )


def through(adapter: Adapter, path: Path) -> Adapter:
    tether.save(adapter, path)
    return tether.load(path)


def same(one: Adapter, other: Adapter) -> None:
    mine, theirs = factors_of(one), factors_of(other)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(theirs[name]) == bits(tensor), name
    for name in ("biases", "modules", "layers"):
        assert list(getattr(one, name)) == list(getattr(other, name))


ADAPTERS = {
    "every part": with_wholes,
    "signed zeros": lambda: dataclasses.replace(
        with_wholes(), biases={"norm": Trained(torch.tensor([-0.0, 0.0]), torch.zeros(2))}
    ),
    "subnormal and largest": lambda: dataclasses.replace(
        with_wholes(), biases={"norm": Trained(torch.tensor([1e-45, 3e38]), None)}
    ),
    "float64": lambda: dataclasses.replace(
        with_wholes(), biases={"norm": anchored(5, dtype=torch.float64)}
    ),
    "views": lambda: dataclasses.replace(
        with_wholes(),
        modules={"m": {"w": Trained(torch.randn(4, 3).T, torch.randn(1, 4).expand(3, 4))}},
    ),
    "one tensor twice": lambda: dataclasses.replace(
        with_wholes(), biases=dict.fromkeys(("a", "b"), whole(3))
    ),
    "gradients": lambda: dataclasses.replace(
        with_wholes(), biases={"a": Trained(torch.ones(2).requires_grad_(), torch.ones(2))}
    ),
    "odd names": lambda: dataclasses.replace(
        with_wholes(),
        biases={"a:b": whole(1), "a:b:module": whole(1), "": whole(1), "é.bias": whole(2)},
        modules={"a": {"b:bias": whole(1), "": whole(1)}, "a:b": {"": whole(1)}},
    ),
}


@pytest.mark.parametrize("make_adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, make_adapter):
    adapter = make_adapter()
    same(adapter, through(adapter, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("kind", SITES)
def test_every_combination_comes_back_and_attaches_bit_for_bit(tmp_path, kind):
    net, x = make(kind)
    for settings in combinations(kind):
        handle = moved(tether.attach(net, config(**settings)))
        live, adapter = bits(net(x)), handle.detach()
        loaded = through(adapter, tmp_path / "a.safetensors")
        same(adapter, loaded)
        again = tether.attach(net, loaded)
        assert bits(net(x)) == live
        same(adapter, again.detach())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_widened_exactly(tmp_path, half):
    adapter = dataclasses.replace(with_wholes(), biases={"norm": anchored(9, dtype=half)})
    bias = through(adapter, tmp_path / "a.safetensors").biases["norm"]
    for found, given in (
        (bias.trainable, adapter.biases["norm"].trainable),
        (bias.anchor, adapter.biases["norm"].anchor),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, given.float())


def test_mixed_precision_is_never_rounded(tmp_path):
    third = torch.ones(2).double() / 3
    for value in (Trained(third, torch.ones(2)), Trained(torch.ones(2), third)):
        adapter = dataclasses.replace(with_wholes(), biases={"norm": value})
        bias = through(adapter, tmp_path / "a.safetensors").biases["norm"]
        assert torch.equal(bias.trainable.double(), value.trainable.double())
        assert torch.equal(bias.anchor.double(), value.anchor.double())


def test_the_header_and_the_tensors_are_the_documented_ones(tmp_path):
    tether.save(with_wholes(), tmp_path / "a.safetensors")
    header, tensors = parts(tmp_path / "a.safetensors")
    assert [entry["magnitude"] for entry in header["layers"]] == ["anchored", "whole"]
    assert header["biases"] == {SITE: "anchored", "norm": "whole"}
    assert header["modules"] == {
        "score": {"weight": "anchored", "bias": "whole"},
        "pooler": {"dense.weight": "whole", "scale": "anchored"},
    }
    assert set(tensors) == {
        *(f"{SITE}.{name}" for name in ("dA", "dB", "A0", "B0")),
        *("head.A", "head.B"),
        *(f"{SITE}:{part}:{name}" for part in ("magnitude", "bias") for name in TWO),
        *("head:magnitude:whole", "norm:bias:whole", "score:bias:module:whole"),
        *(f"score:weight:module:{name}" for name in TWO),
        *("pooler:dense.weight:module:whole",),
        *(f"pooler:scale:module:{name}" for name in TWO),
    }
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "2"


TWO = ("moved", "anchor")


def test_a_loaded_part_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    loaded = through(with_wholes(), path)
    before = {name: bits(tensor) for name, tensor in factors_of(loaded).items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert {name: bits(tensor) for name, tensor in factors_of(loaded).items()} == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [f"{SITE}.magnitude", f"{SITE}.bias", "norm.bias", "score.weight", "pooler.dense.weight"],
)
@pytest.mark.parametrize("side", ["trainable", "anchor"])
def test_a_part_that_is_not_finite_is_not_written(tmp_path, name, side, value):
    path = tmp_path / "a.safetensors"
    tether.save(small_adapter(), path)
    old, adapter = path.read_bytes(), with_wholes()
    tensor = getattr(wholes_of(adapter)[name], side)
    if tensor is None:
        tensor = wholes_of(adapter)[name].trainable
    tensor.view(-1)[1] = value
    with pytest.raises(NonFiniteError, match=name.rpartition(".")[0]):
        tether.save(adapter, path)
    assert path.read_bytes() == old


# ---- version 1


def version_1(path: Path) -> Path:
    """A file as the first version wrote it."""
    tether.save(small_adapter(), path)
    header, tensors = parts(path)
    for entry in header["layers"]:
        assert entry.pop("magnitude") is None
    assert header.pop("biases") == header.pop("modules") == {}
    return seal(path, header, tensors, version="1")


def test_a_file_of_version_1_is_read_exactly(tmp_path):
    loaded, adapter = tether.load(version_1(tmp_path / "a.safetensors")), small_adapter()
    same(adapter, loaded)
    assert (loaded.biases, loaded.modules) == ({}, {})
    assert all(layer.magnitude is None for layer in loaded.layers.values())
    for name in ("provenance", "config", "targets", "excluded"):
        assert getattr(loaded, name) == getattr(adapter, name)
    for path, layer in adapter.layers.items():
        for name in ("scaling", "layout", "dropout"):
            assert getattr(loaded.layers[path], name) == getattr(layer, name)


def test_a_file_of_version_1_is_written_back_as_version_2(tmp_path):
    loaded = tether.load(version_1(tmp_path / "a.safetensors"))
    tether.save(loaded, tmp_path / "b.safetensors")
    tether.save(small_adapter(), tmp_path / "c.safetensors")
    b, c = (safe_open(tmp_path / f"{n}.safetensors", framework="pt").metadata() for n in "bc")
    assert json.loads(b["adapter"]) == json.loads(c["adapter"])
    assert b["version"] == "2"
