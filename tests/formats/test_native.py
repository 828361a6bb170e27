"""The native file gives back what was saved, bit for bit, and says what it holds."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tether
from attacks.forge import small_adapter
from laws.cases import bits, factors_of
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance, TetherError
from tether.errors import HeaderError, NonFiniteError
from tether.fingerprints import fingerprint_tensor
from tether.linalg import Certificate

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1 / 3]


def one_layer(layer: LayerAdapter) -> Adapter:
    return Adapter({"m": layer}, Provenance("lora"))


def plain(a: torch.Tensor, b: torch.Tensor, anchor: Factors | None = None) -> LayerAdapter:
    layout = Layout("linear", (b.shape[0], a.shape[1]))
    return LayerAdapter(Factors(a, b), anchor, 1.0, layout)


def any_bits(*shape: int) -> torch.Tensor:
    """Every kind of finite float32."""
    patterns = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    values = patterns.view(torch.float32)
    return torch.where(values.isfinite(), values, torch.tensor(0.1))


def with_kinds() -> Adapter:
    layouts = {
        "linear": Layout("linear", (3, 4)),
        "transposed": Layout("transposed", (4, 3)),
        "embedding": Layout("embedding", (5, 3)),
        "line": Layout("conv", (3, 2, 3)),
        "plane": Layout("conv", (3, 2, 3, 2), common=False),
        "volume": Layout("conv", (3, 2, 1, 1, 2)),
    }
    layers = {}
    for rank, (path, layout) in enumerate(layouts.items(), start=1):
        factors = Factors(any_bits(rank, layout.in_features), any_bits(3, rank))
        anchor = factors if rank % 2 else None
        layers[path] = LayerAdapter(factors, anchor, 1 / rank, layout, rank / 10)
    return Adapter(layers, Provenance("pissa"))


def shared_by_two_sites() -> Adapter:
    layer = plain(torch.ones(1, 2), torch.ones(2, 1))
    return Adapter({"one": layer, "two": layer}, Provenance("lora"))


ADAPTERS = {
    "an anchored and a plain site": small_adapter,
    "every kind of site": with_kinds,
    "any bits": lambda: one_layer(plain(any_bits(40, 250), any_bits(250, 40))),
    "subnormal, largest and negative zero": lambda: one_layer(
        plain(torch.tensor([EDGES]), torch.tensor([EDGES]).T.contiguous())
    ),
    "float64": lambda: one_layer(
        plain(
            torch.tensor([[1e300, 5e-324]], dtype=torch.float64), torch.full((2, 1), 1 / 3).double()
        )
    ),
    "float64 anchored": lambda: one_layer(
        plain(
            torch.ones(1, 2).double() / 3,
            torch.ones(2, 1).double() / 7,
            anchor=Factors(torch.ones(1, 2).double() / 9, torch.ones(2, 1).double() / 11),
        )
    ),
    "views": lambda: one_layer(plain(any_bits(8, 6)[::2].T, any_bits(6, 9).T)),
    "rows of one value": lambda: one_layer(plain(torch.ones(1, 4), torch.ones(1, 1).expand(3, 1))),
    "halves of one tensor": lambda: one_layer(plain(*any_bits(2, 2, 2).unbind())),
    "gradients": lambda: one_layer(plain(any_bits(1, 2).requires_grad_(), any_bits(2, 1))),
    "one tensor at two sites": shared_by_two_sites,
    "odd names": lambda: replace(
        small_adapter(), targets=("é😀", "../x"), config={"é": [None, True, {"a": 1.5}]}
    ),
}


@pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, make):
    adapter = make()
    tether.save(adapter, tmp_path / "a.safetensors")
    loaded = tether.load(tmp_path / "a.safetensors")
    before, after = factors_of(adapter), factors_of(loaded)
    assert [*before] == [*after]
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].is_contiguous()
        assert bits(after[name]) == bits(tensor), name
    for path, layer in adapter.layers.items():
        other = loaded.layers[path]
        assert (layer.scaling, layer.layout) == (other.scaling, other.layout)
        assert layer.dropout == other.dropout
    for name in ("provenance", "config", "targets", "excluded"):
        assert getattr(adapter, name) == getattr(loaded, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(tmp_path, dtype):
    adapter = one_layer(plain(torch.randn(2, 9).to(dtype), torch.randn(9, 2).to(dtype)))
    tether.save(adapter, tmp_path / "a.safetensors")
    loaded = factors_of(tether.load(tmp_path / "a.safetensors"))
    for name, factor in factors_of(adapter).items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], factor.float())


@pytest.mark.parametrize("wide", ["A", "B", "anchor"])
def test_mixed_precision_is_kept_or_refused_but_never_rounded(tmp_path, wide):
    third = torch.ones(2, 2).double() / 3
    try:
        layer = plain(
            third if wide == "A" else third.float(),
            third if wide == "B" else third.float(),
            anchor=Factors(third, third) if wide == "anchor" else None,
        )
        tether.save(one_layer(layer), tmp_path / "a.safetensors")
    except TetherError:
        return
    loaded = tether.load(tmp_path / "a.safetensors").layers["m"]
    found = loaded.anchor.A if wide == "anchor" else getattr(loaded.trainable, wide)
    assert torch.equal(found.double(), third)


PROVENANCES = [
    Provenance("lora"),
    Provenance(
        method="é\n😀",
        seed=2**63 - 1,
        tether_version="0.1.0",
        base_model="модель/基座 \"'\\",
        base_class="a.b.C",
        learning_rate=0.1 + 0.2,
        steps=10**9,
    ),
    Provenance("", 0, "", "", "", learning_rate=5e-324, steps=0),
    Provenance(
        "pissa",
        fingerprints={
            "m": fingerprint_tensor(torch.ones(2, 2)),
            "é": fingerprint_tensor(torch.zeros(3, 1, dtype=torch.bfloat16)),
        },
        certificates={
            "m": Certificate("lanczos", 3.1e-6, 1e-13, unique=True),
            "é": Certificate("dense", 6e-8, 0.0, unique=False, fallback="gram: 1e-4 ≥ 1e-5"),
        },
    ),
]


@pytest.mark.parametrize("origin", PROVENANCES, ids=lambda origin: origin.method or "empty")
def test_provenance_comes_back(tmp_path, origin):
    adapter = replace(small_adapter(), provenance=origin)
    tether.save(adapter, tmp_path / "a.safetensors")
    loaded = tether.load(tmp_path / "a.safetensors").provenance
    assert loaded == origin
    for item in fields(Provenance):
        assert type(getattr(loaded, item.name)) is type(getattr(origin, item.name))


def test_the_header_is_the_documented_one(tmp_path):
    adapter = small_adapter()
    tether.save(adapter, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    metadata = entries.pop("__metadata__")
    assert set(metadata) == {"format", "version", "adapter", "digests", "digest"}
    assert (metadata["format"], metadata["version"]) == ("tether", "2")
    assert set(entries) == {
        *(f"layers.0.up.{name}" for name in ("dA", "dB", "A0", "B0")),
        *("head.A", "head.B"),
    }
    digests = json.loads(metadata["digests"])
    assert set(digests) == set(entries)
    for name, entry in entries.items():
        assert entry["dtype"] == "F32"
        low, high = entry["data_offsets"]
        assert hashlib.sha256(data[start + low : start + high]).hexdigest() == digests[name]
    sealed = "".join(metadata[key] + "\0" for key in ("version", "adapter", "digests"))
    assert hashlib.sha256(sealed.encode()).hexdigest() == metadata["digest"]
    header = json.loads(metadata["adapter"])
    lists = ("targets", "excluded", "layers")
    assert set(header) == {"config", "provenance", *lists, "biases", "modules"}
    assert header["layers"] == [
        {
            "path": "layers.0.up",
            "kind": "linear",
            "shape": [3, 4],
            "common": True,
            "scaling": 0.5,
            "dropout": 0.125,
            "anchored": True,
            "magnitude": None,
        },
        {
            "path": "head",
            "kind": "linear",
            "shape": [2, 2],
            "common": True,
            "scaling": 1.0,
            "dropout": 0.0,
            "anchored": False,
            "magnitude": None,
        },
    ]
    assert header["biases"] == header["modules"] == {}
    assert header["config"] == {"rank": 2}
    assert header["targets"] == ["up", "head"]
    assert header["excluded"] == ["vision.up"]
    (base,) = header["provenance"].pop("fingerprints").values()
    assert base["sha256"] == hashlib.sha256(np.arange(12, dtype="<f4").tobytes()).hexdigest()
    assert header["provenance"] == {
        "method": "pissa",
        "seed": 0,
        "tether_version": "0.1.0",
        "base_model": "org/base",
        "base_class": "transformers.LlamaForCausalLM",
        "learning_rate": 1e-3,
        "steps": 7,
        "certificates": {},
    }


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with another header, its digests right."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["adapter"])
    change(header)
    metadata["adapter"] = json.dumps(header)
    sealed = "".join(metadata[key] + "\0" for key in ("version", "adapter", "digests"))
    metadata["digest"] = hashlib.sha256(sealed.encode()).hexdigest()
    save_file(tensors, path, metadata)
    return path


def test_a_file_of_before_the_certificates_is_read(tmp_path):
    tether.save(small_adapter(), tmp_path / "a.safetensors")
    path = rewritten(
        tmp_path / "a.safetensors", lambda header: header["provenance"].pop("certificates")
    )
    assert tether.load(path).provenance == small_adapter().provenance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": 3}, "'route' must be str"),
        ({"fallback": "a\x1b[2J"}, "'fallback' is no plain text"),
        ({"product_error": "small"}, "'product_error' must be float"),
        ({"unique": 1}, "'unique' must be bool"),
        ({"more": 1}, "'more' does not belong"),
    ],
)
def test_a_certificate_that_is_none_is_refused(tmp_path, change, message):
    origin = Provenance("pissa", certificates={"head": Certificate("dense", 0.5, 0.5, True)})
    tether.save(replace(small_adapter(), provenance=origin), tmp_path / "a.safetensors")
    path = rewritten(
        tmp_path / "a.safetensors",
        lambda header: header["provenance"]["certificates"]["head"].update(change),
    )
    with pytest.raises(HeaderError, match=message):
        tether.load(path)


def test_any_safetensors_reader_reads_the_tensors(tmp_path):
    tether.save(small_adapter(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert (file.get_tensor("layers.0.up.dB") == np.full((3, 2), -0.5)).all()


def test_the_loaded_adapter_does_not_change_with_the_file(tmp_path):
    path: Path = tmp_path / "a.safetensors"
    tether.save(small_adapter(), path)
    loaded = tether.load(path)
    before = {name: bits(tensor) for name, tensor in factors_of(loaded).items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert {name: bits(tensor) for name, tensor in factors_of(loaded).items()} == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["dA", "dB", "A0", "B0"])
def test_a_factor_that_is_not_finite_is_not_written(tmp_path, where, value):
    path = tmp_path / "a.safetensors"
    tether.save(small_adapter(), path)
    old, adapter = path.read_bytes(), small_adapter()
    layer = adapter.layers["layers.0.up"]
    factors = layer.anchor if where.endswith("0") else layer.trainable
    getattr(factors, where.strip("d0"))[1, 0] = value
    with pytest.raises(NonFiniteError, match=rf"site 'layers\.0\.up': factor {where}.*\(1, 0\)"):
        tether.save(adapter, path)
    assert path.read_bytes() == old


def with_provenance(**origin: object) -> Adapter:
    return replace(small_adapter(), provenance=Provenance(**{"method": "lora"} | origin))


def with_dropout(dropout: float) -> Adapter:
    return one_layer(replace(plain(torch.ones(1, 2), torch.ones(2, 1)), dropout=dropout))


UNREADABLE = {
    "learning rate nan": lambda: with_provenance(learning_rate=float("nan")),
    "learning rate inf": lambda: with_provenance(learning_rate=float("inf")),
    "steps 3.0": lambda: with_provenance(steps=3.0),
    "seed True": lambda: with_provenance(seed=True),
    "method None": lambda: with_provenance(method=None),
    "config nan": lambda: replace(small_adapter(), config={"rank": float("nan")}),
    "dropout -0.1": lambda: with_dropout(-0.1),
    "dropout 1": lambda: with_dropout(1.0),
    "dropout nan": lambda: with_dropout(float("nan")),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, make):
    with pytest.raises(TetherError):
        tether.save(make(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
