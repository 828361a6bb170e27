import copy
import dataclasses
import io

import pytest
import torch
from torch import Tensor, nn

import tether
from laws.cases import bits, factors_of, state_of, truth
from tether import LoraConfig
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    NameTakenError,
    RankTooLargeError,
    ShapeMismatchError,
    ShardedWeightError,
    UnknownNameError,
    UnsupportedModuleError,
)
from tether.layers import apply_adapters

X = torch.linspace(-1, 1, 24).view(4, 6)
CONFIG = LoraConfig(rank=2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.fixture
def model() -> Model:
    return Model()


def moved(handle: tether.Handle, seed: int = 0) -> tether.Handle:
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return handle


def values(adapter: tether.Adapter) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in factors_of(adapter).items()}


def test_a_configuration_its_adapter_and_nothing_are_attached_alike(model):
    by_config = tether.attach(model, LoraConfig(rank=6), "config").snapshot()
    by_value = tether.attach(model, tether.init(model, LoraConfig(rank=6)), "value").snapshot()
    assert values(by_config) == values(by_value)
    assert by_config.provenance == by_value.provenance
    wide = nn.Sequential(nn.Linear(20, 20))
    assert tether.attach(wide).snapshot().layers["0"].rank == 16
    assert list(tether.handles(wide)) == ["default"]


def test_several_adapters_add_their_changes(model):
    base = [w.detach().clone() for w in (model.up.weight, model.down.weight)]
    sources = {
        "pissa": LoraConfig(init="pissa", rank=2, alpha=3),
        "lora": LoraConfig(init="lora", rank=4, use_rslora=True),
        "part": LoraConfig(init="olora", rank=1, target_modules="up"),
    }
    for i, (name, config) in enumerate(sources.items()):
        moved(tether.attach(model, config, name), i)
    live = model(X)
    adapters = [handle.detach() for handle in tether.handles(model).values()]
    expected = copy.deepcopy(model)
    for path in ("up", "down"):
        weight = expected.get_submodule(path).weight
        changes = [truth(a.layers[path]) for a in adapters if path in a.layers]
        assert len(changes) == (3 if path == "up" else 2)
        weight.data += sum(changes).float()
    torch.testing.assert_close(live, expected(X), rtol=1e-5, atol=1e-5)
    assert [bits(w) for w in (model.up.weight, model.down.weight)] == [bits(w) for w in base]


def test_two_adapters_train_side_by_side_as_each_alone(model):
    def train(handle: tether.Handle) -> dict[str, bytes]:
        with tether.only(model, handle.name):
            for _ in range(3):
                for parameter in handle.parameters():
                    parameter.grad = None
                model(X).square().sum().backward()
                for parameter in handle.parameters():
                    parameter.data -= 0.01 * parameter.grad
        return values(handle.snapshot())

    alone = []
    for seed in (1, 2):
        handle = tether.attach(model, LoraConfig(init="lora", rank=2, seed=seed))
        alone.append(train(handle))
        handle.detach()
    a, b = (
        tether.attach(model, LoraConfig(init="lora", rank=2, seed=seed), name)
        for seed, name in ((1, "a"), (2, "b"))
    )
    assert [train(a), train(b)] == alone
    assert values(a.snapshot()) == alone[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factors_are_copied_in_the_dtype_asked_for(model, dtype):
    adapter = tether.init(model, CONFIG)
    before = values(adapter)
    handle = tether.attach(model, adapter, dtype=dtype)
    factors = [t for n, t in model.state_dict().items() if ".tether." in n]
    assert len(factors) == 8
    assert {t.dtype for t in factors} == {dtype}
    moved(handle)
    assert values(adapter) == before
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in factors_of(handle.snapshot()).values()} == {wide}


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ü", 3, "x" * 129, "keys", "training", "A\n"])
def test_a_name_that_cannot_be_used_is_refused(model, name):
    before = state_of(model)
    with pytest.raises(ConfigError, match="name "):
        tether.attach(model, CONFIG, name)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["a", "A-1", "_x", "x" * 128, "tether", "0", "default"])
def test_a_good_name_is_found_again(model, name):
    tether.attach(model, CONFIG, name)
    assert list(tether.handles(model)) == [name]
    assert f"up.tether.{name}.dA" in model.state_dict()


def test_a_taken_name_is_refused_until_it_is_free(model):
    handle = tether.attach(model, CONFIG, "a")
    with pytest.raises(NameTakenError, match=r"adapter 'a'.*handles\(model\)\['a'\].detach\(\)"):
        tether.attach(model, CONFIG, "a")
    handle.detach()
    tether.attach(model, CONFIG, "a")


def other_shape(adapter: tether.Adapter) -> tether.Adapter:
    wider = tether.init(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 7)}), CONFIG)
    return dataclasses.replace(adapter, layers={**adapter.layers, "down": wider.layers["down"]})


def other_path(adapter: tether.Adapter) -> tether.Adapter:
    layers = {"up": adapter.layers["up"], "model.down": adapter.layers["down"]}
    return dataclasses.replace(adapter, layers=layers)


def other_module(adapter: tether.Adapter) -> tether.Adapter:
    return dataclasses.replace(adapter, layers={**adapter.layers, "": adapter.layers["up"]})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (other_shape, ShapeMismatchError, r"'down': the weight here is \(6, 8\).*of \(7, 8\)"),
        (other_path, UnknownNameError, "'model.down', which the model does not have.*'down'"),
        (other_module, UnsupportedModuleError, "site '': Model cannot carry an adapter"),
        (lambda _: LoraConfig(rank=7), RankTooLargeError, "site 'up': rank 7"),
        (lambda _: LoraConfig(rank=2, target_modules="dwn"), UnknownNameError, "'dwn'.*'down'"),
    ],
)
def test_a_failing_attach_leaves_the_model_as_it_was(model, source, error, message):
    adapter = tether.init(model, CONFIG)
    tether.attach(model, adapter, "first", trainable=False)
    wrong = source(adapter)
    before = state_of(model)
    with pytest.raises(error, match=message):
        tether.attach(model, wrong)
    assert state_of(model) == before


def test_a_base_that_cannot_be_frozen_leaves_the_model_as_it_was(model):
    def refuse() -> None:
        raise NotImplementedError("no input embeddings")

    model.is_gradient_checkpointing, model.enable_input_require_grads = True, refuse
    before = state_of(model)
    with pytest.raises(NotImplementedError):
        tether.attach(model, CONFIG)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, None, "float32"])
def test_a_dtype_that_factors_cannot_have_is_refused(model, dtype):
    with pytest.raises(ConfigError, match=f"dtype {dtype} is none of torch.float32"):
        tether.attach(model, CONFIG, dtype=dtype)


def test_the_wrong_base_is_refused_by_its_first_differing_site(model):
    adapter = tether.init(model, CONFIG)
    model.down.weight.data[3, 2] += 1e-3
    before = state_of(model)
    with pytest.raises(BaseMismatchError, match=r"^site 'down'.*sha256.*verify=False"):
        tether.attach(model, adapter)
    assert state_of(model) == before
    model.up.weight.data[0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match=r"^site 'up'"):
        tether.attach(model, adapter)
    tether.attach(model, adapter, verify=False)


def test_the_same_base_in_another_precision_is_accepted_and_a_changed_one_is_not(model):
    adapter = tether.init(model, CONFIG)
    half = copy.deepcopy(model).bfloat16()
    tether.attach(half, adapter)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    half.up.weight.data[0, 0] *= 1.01
    with pytest.raises(BaseMismatchError, match=r"'up'.*bfloat16 \(8, 6\).*on float32 \(8, 6\)"):
        tether.attach(half, adapter)


def test_biases_and_other_modules_may_change(model):
    adapter = tether.init(model, LoraConfig(rank=2, target_modules="up"))
    model.down.weight.data.zero_()
    model.up.bias.data.zero_()
    tether.attach(model, adapter)


def test_a_sharded_base_is_refused(model, mesh):
    from torch.distributed.tensor import distribute_module

    adapter = tether.init(model, CONFIG)
    sharded = distribute_module(model, mesh)
    before = list(sharded.state_dict())
    for source in (CONFIG, adapter):
        with pytest.raises(ShardedWeightError, match=r"site 'up'.*Attach before fully_shard"):
            tether.attach(sharded, source)
    assert list(sharded.state_dict()) == before


def test_an_adapter_survives_fully_shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    handle = moved(tether.attach(model, CONFIG))
    expected, live = values(handle.snapshot()), model(X)
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh)
    torch.testing.assert_close(model(X).detach(), live.detach())
    (handle,) = tether.handles(model).values()
    assert values(handle.snapshot()) == expected


def test_a_deep_copy_has_its_own_adapters(model):
    handle = moved(tether.attach(model, CONFIG, "a"))
    tether.attach(model, LoraConfig(init="lora", rank=1), "b", trainable=False)
    live, expected = bits(model(X)), values(handle.snapshot())
    copied = copy.deepcopy(model)
    copies = tether.handles(copied)
    assert list(copies) == ["a", "b"]
    assert bits(copied(X)) == live
    moved(copies["a"], 5)
    with copies["a"].disabled():
        assert handle.active
        assert bits(model(X)) == live
    assert bits(copied(X)) != live
    assert values(handle.snapshot()) == expected
    for each in copies.values():
        each.detach()
    assert all(p.requires_grad for p in copied.parameters())
    assert tether.handles(copied) == {}
    assert not any(m._forward_hooks for m in copied.modules())
    assert bits(model(X)) == live
    assert handle.attached
    assert not model.up.weight.requires_grad
    handle.detach()
    assert model.up.weight.requires_grad


def test_a_model_saved_whole_comes_back_with_its_adapters(model):
    handle = moved(tether.attach(model, CONFIG))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert bits(loaded(X)) == bits(model(X))
    (found,) = tether.handles(loaded).values()
    assert values(found.snapshot()) == values(handle.snapshot())
    assert found.snapshot().provenance == handle.snapshot().provenance
    found.detach()
    assert loaded.up.weight.requires_grad
    assert handle.attached


def test_a_state_dict_saves_and_restores_the_factors(model):
    base = bits(model(X))
    handle = moved(tether.attach(model, CONFIG))
    live, buffer = bits(model(X)), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Model()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if ".tether." not in k})
    assert bits(other(X)) == base
    tether.attach(other, CONFIG)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert bits(other(X)) == live
    assert values(tether.handles(other)["default"].snapshot()) == values(handle.snapshot())


def test_the_model_can_move_and_change_dtype_with_its_adapter(model):
    handle = moved(tether.attach(model, CONFIG))
    live = model(X)
    model.double()
    torch.testing.assert_close(model(X.double()).float(), live, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    assert {t.dtype for t in factors_of(handle.snapshot()).values()} == {torch.float64}


def test_a_tied_twin_is_not_changed(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True).eval()
    ids = torch.arange(10).view(2, 5)
    hidden = model.model(ids).last_hidden_state
    head = bits(model.lm_head(hidden))
    handle = moved(tether.attach(model, LoraConfig(rank=2, target_modules="embed_tokens")))
    assert bits(model.lm_head(hidden)) == head
    assert bits(model.model(ids).last_hidden_state) != bits(hidden)
    assert handle.detach().layers["model.embed_tokens"].layout.kind == "embedding"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generate_runs_with_without_and_after_an_adapter(tiny_llama):
    model = tiny_llama().eval()

    def generated() -> list[int]:
        ids = torch.tensor([[1, 2, 3]])
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()

    base = generated()
    handle = tether.attach(model, LoraConfig(rank=4))
    assert generated() == base
    for parameter in handle.parameters():
        parameter.data.normal_()
    live = generated()
    assert live != base
    with tether.reference(model):
        assert generated() == base
    assert generated() == live
    handle.detach()
    assert generated() == base


def test_hooks_of_others_stay(model):
    calls = []
    before = model.up.register_forward_hook(lambda *_: calls.append("before"))
    handle = tether.attach(model, CONFIG)
    model.up.register_forward_hook(lambda *_: calls.append("after"))
    assert sum(hook is apply_adapters for hook in model.up._forward_hooks.values()) == 1
    second = tether.attach(model, CONFIG, "second")
    assert sum(hook is apply_adapters for hook in model.up._forward_hooks.values()) == 1
    handle.detach()
    second.detach()
    assert len(model.up._forward_hooks) == 2
    assert not model.up._forward_hooks_with_kwargs
    before.remove()
    model(X)
    assert calls == ["after"]


def test_an_encoder_of_torch_has_no_fast_path_around_the_adapter():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model, x = nn.Sequential(encoder), torch.randn(2, 5, 8)
    config = LoraConfig(rank=2, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        handle = moved(tether.attach(model, config))
        live = model(x)
        adapter = handle.detach()
        for path, layer in adapter.layers.items():
            model.get_submodule(path).weight.add_(truth(layer).float())
        torch.testing.assert_close(live, model(x), rtol=1e-4, atol=1e-5)


class Occupied(nn.Linear):
    """Has a part that is named as the adapters' child would be."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.tether = nn.Linear(6, 6)


def test_a_module_whose_part_is_named_tether_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": Occupied()})
    before = state_of(model)
    with pytest.raises(UnsupportedModuleError, match=r"site 'second'.*'tether'"):
        tether.attach(model, CONFIG)
    assert state_of(model) == before
