"""A PEFT folder is read as peft would compute it; files of peft itself are in tests/peers."""

import math

import pytest
import torch

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS, peft_folder, peft_tensors
from laws.cases import bits, factors_of, truth
from tether import Layout
from tether.errors import UnsupportedAdapterError
from tether.fingerprints import fingerprint_tensor

T = torch.ones


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"m": 10}}, 5.0),
        ({"alpha_pattern": {r"layers\.1\.m": 7, "m": 10}}, 5.0),
        ({"alpha_pattern": {"x": 10}}, 2.0),
        ({"alpha_pattern": {"m": 10}, "use_rslora": True}, 10 / math.sqrt(2)),
        ({"alpha_pattern": None, "rank_pattern": None}, 2.0),
    ],
    ids=str,
)
def test_the_scaling(tmp_path, config, scaling):
    site = "layers.0.m"
    peft_folder(tmp_path / "lora", config, peft_tensors(site))
    assert tether.load(tmp_path / "lora").layers[site].scaling == pytest.approx(scaling, rel=1e-15)


def test_every_site_has_its_own_rank_and_alpha(tmp_path):
    tensors = peft_tensors("a") | {
        f"{PREFIX}b.c.lora_A.weight": T(5, 3),
        f"{PREFIX}b.c.lora_B.weight": T(4, 5),
    }
    config = {"rank_pattern": {"b.c": 5}, "alpha_pattern": {"c": 20}, "use_rslora": True}
    layers = tether.load(peft_folder(tmp_path / "lora", config, tensors)).layers
    assert [(path, layer.rank) for path, layer in layers.items()] == [("a", 2), ("b.c", 5)]
    assert layers["a"].scaling == 4 / math.sqrt(2)
    assert layers["b.c"].scaling == 20 / math.sqrt(5)


@pytest.mark.parametrize(
    ("suffixes", "a", "b", "config", "layout"),
    [
        ("linear", (2, 3), (4, 2), {}, Layout("linear", (4, 3))),
        ("linear", (2, 3), (4, 2), {"fan_in_fan_out": True}, Layout("transposed", (3, 4))),
        ("embedding", (2, 3), (4, 2), {}, Layout("embedding", (3, 4))),
        ("embedding", (2, 3), (4, 2), {"fan_in_fan_out": True}, Layout("embedding", (3, 4))),
        ("linear", (2, 3, 5), (4, 2, 1), {}, Layout("conv", (4, 3, 5))),
        ("linear", (2, 3, 5, 6), (4, 2, 1, 1), {}, Layout("conv", (4, 3, 5, 6))),
        ("linear", (2, 3, 5, 6, 1), (4, 2, 1, 1, 1), {}, Layout("conv", (4, 3, 5, 6, 1))),
    ],
    ids=str,
)
def test_every_kind_of_site(tmp_path, suffixes, a, b, config, layout):
    names = ("embedding_A", "embedding_B") if suffixes == "embedding" else ("A.weight", "B.weight")
    keys = [f"{PREFIX}m.lora_{name}" for name in names]
    tensors = dict(zip(keys, (torch.randn(a), torch.randn(b)), strict=True))
    layer = tether.load(peft_folder(tmp_path / "lora", config, tensors)).layers["m"]
    assert layer.layout == layout
    assert layer.anchor is None
    assert torch.equal(layer.trainable.A, tensors[keys[0]].flatten(1))
    assert torch.equal(layer.trainable.B, tensors[keys[1]].flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_becomes_float32(tmp_path, dtype):
    tensors = {key: torch.randn(t.shape).to(dtype) for key, t in peft_tensors().items()}
    factors = tether.load(peft_folder(tmp_path / "lora", {}, tensors)).layers["m"].trainable
    for factor, tensor in zip((factors.A, factors.B), tensors.values(), strict=True):
        assert factor.dtype == torch.float32
        assert torch.equal(factor, tensor.float())


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_every_start_on_the_base_itself(tmp_path, init):
    peft_folder(tmp_path / "lora", {"init_lora_weights": init})
    assert list(tether.load(tmp_path / "lora").layers) == ["m"]


def test_fields_that_change_nothing(tmp_path):
    config = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": [],
        "layer_replication": None,
        "lora_bias": False,
        "loftq_config": {},
        "a field of tomorrow": None,
        "peft_version": "0.99",
        "eva_config": {"rho": 2.0},
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
    }
    assert list(tether.load(peft_folder(tmp_path / "lora", config)).layers) == ["m"]


@pytest.mark.parametrize(
    ("targets", "others", "expected", "excluded"),
    [
        (["q", "p"], {}, ("p", "q"), ()),
        (["q", "p", "other"], {}, ("other", "p", "q"), ()),
        (["0.q", "layers.0.p"], {}, ("0.q", "layers.0.p"), ()),
        (["q", "p"], {"exclude_modules": ["vision.q", "b"]}, ("p", "q"), ("b", "vision.q")),
        (["q"], {}, None, ()),
        ([], {}, None, ()),
        (None, {}, None, ()),
        ("all-linear", {}, None, ()),
        ("(a+)+$", {}, None, ()),
        (["q", ".*"], {}, None, ()),
        (["q", "p", "../x"], {}, None, ()),
        (["q", "p", 3], {}, None, ()),
        (["q", "p"], {"layers_to_transform": [0]}, None, ()),
        (["q", "p"], {"exclude_modules": "(a+)+$"}, None, ()),
        (["q", "p"], {"exclude_modules": [["x"]]}, None, ()),
    ],
    ids=str,
)
def test_the_targets_are_the_file_s_own_where_they_name_every_site(
    tmp_path, targets, others, expected, excluded
):
    tensors = peft_tensors("layers.0.q") | peft_tensors("layers.0.p")
    folder = peft_folder(tmp_path / "lora", {"target_modules": targets} | others, tensors)
    adapter = tether.load(folder)
    assert adapter.targets == (expected or tuple(adapter.layers))
    assert adapter.excluded == excluded


def test_a_copy_of_the_base_s_weight_tells_which_base_it_is(tmp_path):
    """peft adds them for embeddings."""
    base = torch.randn(3, 4)
    copies = {
        f"{PREFIX}m.base_layer.weight": base,
        f"{PREFIX}m.base_layer.bias": T(4),
    }
    adapter = tether.load(peft_folder(tmp_path / "lora", {}, peft_tensors() | copies))
    assert list(adapter.layers) == ["m"]
    assert adapter.provenance.fingerprints == {"m": fingerprint_tensor(base)}


def test_a_weight_beside_no_factors_is_refused(tmp_path):
    odd = {f"{PREFIX}other.base_layer.weight": torch.randn(3, 4)}
    folder = peft_folder(tmp_path / "lora", {}, peft_tensors() | odd)
    with pytest.raises(UnsupportedAdapterError, match=r"'other'.*no LoRA for it: it would be lost"):
        tether.load(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/base", "org/base"), ("é\n😀", "é\n😀"), ("", None), (None, None), (3, None), ([], None)],
    ids=repr,
)
def test_where_it_came_from(tmp_path, name, expected):
    adapter = tether.load(peft_folder(tmp_path / "lora", {"base_model_name_or_path": name}))
    assert adapter.provenance == tether.Provenance("unknown", base_model=expected)
    assert adapter.config == {}


def test_dropout(tmp_path):
    peft_folder(tmp_path / "lora", {"lora_dropout": 0.25})
    assert tether.load(tmp_path / "lora").layers["m"].dropout == 0.25


def test_reading_and_writing_again_changes_no_byte(tmp_path):
    tensors = {
        key: torch.randn(tensor.shape)
        for site in ("layers.0.m", "x")
        for key, tensor in peft_tensors(site).items()
    }
    peft_folder(tmp_path / "zero", {"lora_alpha": 3, "base_model_name_or_path": "é"}, tensors)
    loaded = tether.load(tmp_path / "zero")
    tether.save_as_lora(loaded, tmp_path / "one")
    again = tether.load(tmp_path / "one")
    tether.save_as_lora(again, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for path, layer in loaded.layers.items():
        error = (truth(again.layers[path]) - truth(layer)).norm()
        assert error <= 1e-7 * truth(layer).norm()
        assert again.layers[path].layout == layer.layout


def test_the_loaded_adapter_does_not_change_with_the_file(tmp_path):
    adapter = tether.load(peft_folder(tmp_path / "lora"))
    before = {name: bits(tensor) for name, tensor in factors_of(adapter).items()}
    for name in (CONFIG, WEIGHTS):
        path = tmp_path / "lora" / name
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\xff" * size)
    assert {name: bits(tensor) for name, tensor in factors_of(adapter).items()} == before
