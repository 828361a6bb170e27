"""The PEFT folder is canonical: every reader computes the same ΔW from it, in every dtype."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS, small_adapter
from laws.cases import bits, truth
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance
from tether.errors import ConfigError, NonFiniteError, UnsupportedAdapterError
from tether.formats import peft_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAYOUTS = {
    "linear": Layout("linear", (5, 7)),
    "transposed": Layout("transposed", (7, 5)),
    "embedding": Layout("embedding", (7, 5)),
    "line": Layout("conv", (5, 2, 3)),
    "plane": Layout("conv", (5, 2, 3, 2)),
    "volume": Layout("conv", (5, 2, 1, 3, 2)),
}


def layer_of(
    rank: int, scaling: float = 1.0, layout: Layout = LAYOUTS["linear"], size: float = 1.0
) -> LayerAdapter:
    """Plain; A of ordinary size, B of `size`."""
    a, b = torch.randn(rank, layout.in_features), size * torch.randn(layout.out_features, rank)
    return LayerAdapter(Factors(a, b), None, scaling, layout)


def adapter_of(**layers: LayerAdapter) -> Adapter:
    return Adapter(layers, Provenance("lora"))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scaling", [1.0, 0.5, 1 / 3, 7.3, 1e-20])
def test_folding_and_balancing_round_only_once(scaling):
    layer = layer_of(3, scaling, size=1e-6)
    written = peft_write.canonical(adapter_of(m=layer))["m"]
    assert written.scaling == 1
    a, b = layer.trainable.A, scaling * layer.trainable.B
    for k in range(3):
        exact = b[:, k, None].double() @ a[k, None].double()
        found = written.trainable.B[:, k, None].double() @ written.trainable.A[k, None].double()
        assert torch.equal(found, exact)
        ratio = written.trainable.A[k].abs().max() / written.trainable.B[:, k].abs().max()
        assert 0.5 <= ratio <= 2


@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-8])
def test_a_tiny_displacement_survives_float16(size):
    layer = layer_of(4, size=size)
    exact, unbalanced = truth(layer), layer.trainable.to(torch.float16)
    lost = relative(unbalanced.B.double() @ unbalanced.A.double(), exact)
    assert lost > {1e-5: 1e-3, 1e-6: 0.01, 1e-8: 0.9}[size]
    written = peft_write.canonical(adapter_of(m=layer), torch.float16)["m"]
    assert relative(truth(written), exact) < 3e-4


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_an_anchored_displacement_survives_half_precision(size):
    anchor = layer_of(4).trainable
    moved = Factors(size * torch.randn(4, 7), size * torch.randn(5, 4))
    layer = LayerAdapter(moved, anchor, 2.0, LAYOUTS["linear"])
    plain = tether.to_lora(adapter_of(m=layer))
    for dtype, limit in ((torch.float16, 5e-4), (torch.bfloat16, 4e-3)):
        assert relative(truth(peft_write.canonical(plain, dtype)["m"]), truth(layer)) < limit


def test_zero_rows_and_columns_stay_as_they_are():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]]), torch.tensor([[5.0, 0.0, -0.0]])
    layer = LayerAdapter(Factors(a, b), None, 1.0, Layout("linear", (1, 2)))
    written = peft_write.canonical(adapter_of(m=layer))["m"].trainable
    assert (bits(written.A), bits(written.B)) == (bits(a), bits(b))


def constant(a: float, b: float, scaling: float = 1.0, wide: torch.dtype = torch.float32):
    factors = Factors(torch.full((1, 7), a, dtype=wide), torch.full((5, 1), b, dtype=wide))
    return LayerAdapter(factors, None, scaling, LAYOUTS["linear"])


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (constant(1, 1e30, 1e30), torch.float32),
        (constant(1, 1, 1e10), torch.float16),
        (constant(1e6, 1e6), torch.float16),
        (constant(1e300, 1e300, wide=torch.float64), torch.float32),
        (constant(1, torch.nan), torch.bfloat16),
    ],
    ids=["float32", "scaling in float16", "factors in float16", "float64", "nan"],
)
def test_a_value_that_does_not_fit_is_refused_by_name(tmp_path, layer, dtype):
    adapter = adapter_of(fine=layer_of(1), bad=layer)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NonFiniteError, match=f"site 'bad': factor [AB] in {name}"):
        peft_write.save(adapter, tmp_path / "lora", dtype)
    assert list(tmp_path.iterdir()) == []


@every_dtype
def test_every_site_has_the_largest_rank_by_zero_rows(tmp_path, dtype):
    ranks = {"a": 1, "b": 4, "c": 2}
    adapter = adapter_of(**{name: layer_of(rank, 2.0) for name, rank in ranks.items()})
    peft_write.save(adapter, tmp_path / "lora", dtype)
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    for name, rank in ranks.items():
        a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        assert (tuple(a.shape), tuple(b.shape)) == ((4, 7), (5, 4))
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        assert a[:rank].any(dim=1).all()
        assert relative(b.double() @ a.double(), truth(adapter.layers[name])) < 0.01


@every_dtype
def test_the_numbers_in_the_file_are_the_canonical_ones(tmp_path, dtype):
    adapter = adapter_of(one=layer_of(2, 0.3), two=layer_of(3, 0.7, size=1e-5))
    peft_write.save(adapter, tmp_path / "lora", dtype)
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    for name, layer in peft_write.canonical(adapter, dtype).items():
        for side in "AB":
            found = tensors.pop(f"{PREFIX}{name}.lora_{side}.weight")
            assert found.dtype == dtype
            assert bits(found) == bits(getattr(layer.trainable, side))
    assert not tensors


@pytest.mark.parametrize("kind", LAYOUTS)
def test_keys_and_shapes_of_every_kind_of_site(tmp_path, kind):
    layer = layer_of(2, layout=LAYOUTS[kind])
    peft_write.save(adapter_of(m=layer), tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    stem = f"{PREFIX}m.lora_"
    if kind == "embedding":
        expected = {f"{stem}embedding_A": (2, 7), f"{stem}embedding_B": (5, 2)}
    else:
        kernel = LAYOUTS[kind].shape[2:]
        a = (2, 2, *kernel) if kernel else (2, 7)
        expected = {f"{stem}A.weight": a, f"{stem}B.weight": (5, 2, *(1 for _ in kernel))}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    a, b = tensors.values()
    assert relative(b.flatten(1) @ a.flatten(1), truth(layer)) < 1e-6
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["fan_in_fan_out"] is (kind == "transposed")


def test_the_config_is_canonical(tmp_path):
    dropouts = {"a.b": 0.1, "c": 0.25}
    layers = {name: replace(layer_of(3, 1.7), dropout=p) for name, p in dropouts.items()}
    adapter = Adapter(layers, Provenance("pissa", base_model='org/"base"\n'), {}, ("b", "c"))
    peft_write.save(adapter, tmp_path / "lora", torch.bfloat16)
    assert json.loads((tmp_path / "lora" / CONFIG).read_text(encoding="utf-8")) == {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": 'org/"base"\n',
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["b", "c"],
        "exclude_modules": None,
        "lora_dropout": 0.25,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
        "revision": None,
    }


CLASSES = {
    "transformers.LlamaForCausalLM": ("LlamaForCausalLM", "transformers"),
    "transformers.models.gpt2.modeling_gpt2.X": ("X", "transformers.models.gpt2.modeling_gpt2"),
    **dict.fromkeys([None, "", "transformers", "transformers.", "transformers..X", "os.system"]),
    **dict.fromkeys(["transformersx.Y", " transformers.X", "transformers.X\n", "transformers.a-b"]),
    **dict.fromkeys(["transformers.é", "x.transformers.X", "transformers.X;os"]),
}


@pytest.mark.parametrize(("name", "expected"), CLASSES.items(), ids=repr)
def test_only_classes_of_transformers_are_named_for_peft_to_import(tmp_path, name, expected):
    adapter = Adapter({"m": layer_of(1)}, Provenance("lora", base_class=name))
    peft_write.save(adapter, tmp_path / "lora")
    found = json.loads((tmp_path / "lora" / CONFIG).read_text())["auto_mapping"]
    keys = ("base_model_class", "parent_library")
    assert found == (expected and dict(zip(keys, expected, strict=True)))


def test_excluded_names_are_written(tmp_path):
    adapter = replace(adapter_of(m=layer_of(1)), excluded=("vision.m", "other"))
    peft_write.save(adapter, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["exclude_modules"] == ["vision.m", "other"]


def test_an_excluded_name_that_peft_would_take_for_a_site_is_refused(tmp_path):
    adapter = replace(adapter_of(**{"block.proj": layer_of(1)}), excluded=("proj",))
    with pytest.raises(UnsupportedAdapterError, match=r"'block\.proj'.*'proj'.*native file"):
        peft_write.save(adapter, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_three_files_and_the_same_bytes_every_time(tmp_path):
    adapter = tether.to_lora(small_adapter())
    for name in ("one", "two", "two"):
        peft_write.save(adapter, tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert set(one) == {CONFIG, WEIGHTS, "README.md"}
    assert one == two
    with safe_open(tmp_path / "one" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(ConfigError, match=f"{dtype} is none of float32, bfloat16, float16"):
        peft_write.save(adapter_of(m=layer_of(1)), tmp_path / "lora", dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_anchored_adapter_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"site 'layers\.0\.up' has an anchor.*tether\.to_lora"):
        peft_write.save(small_adapter(), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_peft_would_compute_otherwise_is_refused_by_name(tmp_path):
    odd = layer_of(1, layout=Layout("conv", (5, 2, 3), common=False))
    with pytest.raises(UnsupportedAdapterError, match=r"site 'odd'.*Save the native file"):
        peft_write.save(adapter_of(fine=layer_of(1), odd=odd), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_is_not_changed(tmp_path):
    layer = layer_of(2, 0.3, size=1e-6)
    before = bits(layer.trainable.A), bits(layer.trainable.B)
    peft_write.save(adapter_of(m=layer), tmp_path / "lora", torch.float16)
    assert (bits(layer.trainable.A), bits(layer.trainable.B)) == before
