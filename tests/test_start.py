from importlib.metadata import version

import pytest
import torch
from torch import nn

import tether
from laws.cases import bits
from tether import algebra
from tether.errors import ConvergenceError, MetaTensorError
from tether.methods.pissa import PiSSA


def model() -> nn.Module:
    torch.manual_seed(0)
    block = {"up": nn.Linear(8, 12), "norm": nn.LayerNorm(12), "down": nn.Linear(12, 8)}
    return nn.ModuleDict({"embed": nn.Embedding(10, 8), "block": nn.ModuleDict(block)})


def test_an_adapter_records_where_it_came_from():
    config = tether.LoraConfig(init="milora", rank=2, seed=7, dropout=0.1)
    base = model()
    adapter = tether.init(base, config)
    provenance = adapter.provenance
    assert (provenance.method, provenance.seed) == ("milora", 7)
    assert provenance.tether_version == version("tether") == tether.__version__
    for unknown in ("base_model", "base_class", "learning_rate", "steps"):
        assert getattr(provenance, unknown) is None
    whole = tether.fingerprint(base)
    assert provenance.fingerprints == {
        path: whole[path + ".weight"] for path in ("block.up", "block.down")
    }
    assert adapter.config == config.to_dict()
    assert (adapter.targets, adapter.excluded) == (("down", "up"), ())
    assert {layer.dropout for layer in adapter.layers.values()} == {0.1}


def test_the_name_and_class_of_a_transformers_base_are_recorded(tiny_llama):
    llama = tiny_llama()
    assert tether.init(llama, tether.LoraConfig(rank=2)).provenance.base_model is None
    llama.config._name_or_path = "somebody/llama"
    adapter = tether.init(llama, tether.LoraConfig(rank=2))
    assert adapter.provenance.base_model == "somebody/llama"
    assert adapter.provenance.base_class == (
        "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    )
    assert adapter.targets == tuple(
        sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    )
    assert len(adapter.layers) == 2 * 7


def test_without_a_configuration_it_is_pissa_of_rank_16():
    base = nn.Sequential(nn.Linear(20, 30))
    layer = tether.init(base).layers["0"]
    assert (layer.rank, layer.scaling) == (16, 1.0)
    assert layer.anchor is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_start_is_zero_float32_and_free_of_the_model(dtype):
    base = model().to(dtype)
    adapter = tether.init(base, tether.LoraConfig(rank=3))
    for path, layer in adapter.layers.items():
        assert not algebra.delta(layer).any()
        assert not layer.trainable.A.any()
        for factor in (layer.trainable.A, layer.trainable.B, layer.anchor.A, layer.anchor.B):
            assert (factor.dtype, factor.device.type) == (torch.float32, "cpu")
            assert not factor.requires_grad
            weight = base.get_submodule(path).weight
            assert factor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_a_bfloat16_base_and_the_same_values_in_float32_have_the_same_anchor():
    base = model().bfloat16()
    one = tether.init(base, tether.LoraConfig(rank=3))
    other = tether.init(base.float(), tether.LoraConfig(rank=3))
    for path, layer in one.layers.items():
        assert bits(layer.anchor.A) == bits(other.layers[path].anchor.A)
        assert bits(layer.anchor.B) == bits(other.layers[path].anchor.B)


def test_a_compiled_model_has_the_paths_of_the_model_inside():
    base = model()
    adapter = tether.init(torch.compile(base), tether.LoraConfig(rank=2))
    assert list(adapter.layers) == ["block.up", "block.down"]


def test_an_attached_adapter_does_not_change_another_ones_start():
    base, config = model(), tether.LoraConfig(rank=2)
    alone = tether.init(base, config)
    handle = tether.attach(base, config)
    for parameter in handle.parameters():
        parameter.data.normal_()
    beside = tether.init(base, config)
    assert list(beside.layers) == list(alone.layers)
    assert beside.provenance == alone.provenance
    assert bits(beside.layers["block.up"].anchor.A) == bits(alone.layers["block.up"].anchor.A)


def test_an_error_of_the_method_names_the_site():
    config = tether.LoraConfig(init=PiSSA(tolerance=1e-30), rank=2)
    with pytest.raises(ConvergenceError, match=r"^site 'block.up': singular triplets"):
        tether.init(model(), config)


def test_progress_is_told_site_by_site():
    told = []
    tether.init(
        model(), tether.LoraConfig(rank=2), progress=lambda done, count: told.append((done, count))
    )
    assert told == [(1, 2), (2, 2)]


def test_a_fingerprint_needs_values():
    with pytest.raises(MetaTensorError, match=r"^embed.weight: .* meta device"):
        tether.fingerprint(model().to("meta"))
