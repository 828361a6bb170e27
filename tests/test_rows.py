"""Different adapters for the rows of one batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tether
from laws.cases import bits
from tether import LoraConfig
from tether.errors import ConfigError, OffloadedError, RowsError, UnknownNameError
from tether.layers import records_of
from tether.rows import rows
from tether.switch import activate

IDS = torch.randint(1, 32, (5, 6), generator=torch.Generator().manual_seed(1))
NAMES = ["a", "base", "b", None, "a"]
SETTINGS = {
    "anchored": {},
    "plain": {"init": "lora"},
    "dora": {"use_dora": True},
    "biased": {"target_modules": ["up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


def moved(model: nn.Module, name: str, **settings: object) -> tether.Handle:
    handle = tether.attach(model, LoraConfig(rank=2, **settings), name)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return handle


def adapted(model: nn.Module, names: str = "ab", **settings: object) -> nn.Module:
    """The model with adapters that have moved, the last one active."""
    for name in names:
        activate(model)
        moved(model, name, **settings)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def each_alone(model: nn.Module, names: Sequence[str | None], ids: Tensor = IDS) -> Tensor:
    """Row by row what the adapter of the row alone gives for the whole batch."""
    result = torch.empty_like(logits(model, ids))
    for row, name in enumerate(names):
        with tether.only(model, *([] if name in (None, "base") else [name])):
            result[row] = logits(model, ids)[row]
    return result


def state(model: nn.Module) -> list[tuple[bool, float, object]]:
    return [(record.active, record.weight, record.rows) for record in records_of(model)]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_row_has_its_own_adapter(tiny_llama, kind):
    model = adapted(tiny_llama(tie_word_embeddings=False), **SETTINGS[kind])
    wanted, before = each_alone(model, NAMES), state(model)
    with rows(model, NAMES):
        found = logits(model)
    assert state(model) == before
    with tether.reference(model):
        base = logits(model)
    assert torch.equal(found[1], base[1])
    assert torch.equal(found[3], base[3])
    assert float((found - base)[[0, 2, 4]].abs().amax(dim=(1, 2)).min()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_rows_of_one_adapter_are_that_adapter_bit_for_bit(tiny_llama):
    model = adapted(tiny_llama())
    with tether.only(model, "a"):
        alone = bits(logits(model))
    with rows(model, ["a"] * 5):
        assert bits(logits(model)) == alone
    with rows(model, [None] * 5), tether.only(model, "b"):
        inside = bits(logits(model))
    with tether.only(model, "b"):
        assert bits(logits(model)) == inside


def test_gradients_reach_each_adapter_from_its_own_rows(tiny_llama):
    model = adapted(tiny_llama())
    a, b = tether.handles(model).values()
    with rows(model, NAMES):
        model(IDS).logits.square().sum().backward()
    mixed = {name: [p.grad.clone() for p in h.parameters()] for name, h in (("a", a), ("b", b))}
    for name, handle, own in (("a", a, [0, 4]), ("b", b, [2])):
        for parameter in handle.parameters():
            parameter.grad = None
        with tether.only(model, name):
            model(IDS).logits[own].square().sum().backward()
        for found, parameter in zip(mixed[name], handle.parameters(), strict=True):
            assert parameter.grad.any()
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)


def generate(model: nn.Module, **settings: object) -> Tensor:
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, pad_token_id=0, **settings
    )


def strong(model: nn.Module) -> nn.Module:
    """Adapters that change which token comes next."""
    adapted(model)
    for handle in tether.handles(model).values():
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter *= 8
    return model


def test_generation_with_an_adapter_for_each_row(tiny_llama):
    model = strong(tiny_llama())
    with rows(model, NAMES):
        mixed = generate(model, do_sample=False)
    outputs = {}
    for name in ("a", "b", "base"):
        with tether.only(model, *[name] * (name != "base")):
            outputs[name] = generate(model, do_sample=False)
    assert not torch.equal(outputs["a"], outputs["base"])
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], outputs[name or "base"][row])


def test_beams_need_every_name_as_often(tiny_llama):
    model = strong(tiny_llama())
    with rows(model, NAMES), pytest.raises(RowsError, match=r"10 rows here, 5 names.*num_beams"):
        generate(model, num_beams=2)
    with rows(model, [name for name in NAMES for _ in range(2)]):
        mixed = generate(model, num_beams=2)
    with tether.only(model, "a"):
        alone = generate(model, num_beams=2)
    assert torch.equal(mixed[[0, 4]][:, : alone.shape[1]], alone[[0, 4]][:, : mixed.shape[1]])


def test_a_table_of_positions_wants_an_input_for_each_row():
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = adapted(GPT2LMHeadModel(config), target_modules=["wpe", "c_attn"])
    with rows(model, NAMES), pytest.raises(RowsError) as caught:
        logits(model)
    assert str(caught.value).startswith(
        "site 'transformer.wpe': 1 rows here, 5 names given to tether.rows."
    )
    assert "position_ids" in str(caught.value)
    positions = torch.arange(6).expand(5, 6)
    with rows(model, NAMES), torch.no_grad():
        found = model(IDS, position_ids=positions).logits
    torch.testing.assert_close(found, each_alone(model, NAMES), rtol=0, atol=1e-6)


def test_a_module_with_several_inputs_cannot_be_trained_whole_by_row():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.join = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.up(x), x)

    model = Two()
    moved(model, "a", target_modules=["up"], modules_to_save=["join"])
    with rows(model, ["a", None]), pytest.raises(RowsError, match="module 'join': 2 inputs"):
        model(torch.randn(2, 4))


def test_a_module_that_turns_its_input_cannot_be_trained_whole_by_row():
    class Turn(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1)

    model = nn.Sequential(nn.Linear(4, 4), Turn(4, 4))
    moved(model, "a", target_modules=["0"], modules_to_save=["1"])
    with rows(model, ["a", None]), pytest.raises(RowsError, match=r"site '1': 3 rows here, 2 "):
        model[1](torch.randn(3, 2, 4))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4)])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "c"], UnknownNameError, r"no adapter 'c'.*'a'"),
        (["a", 3], UnknownNameError, "no adapter 3"),
        ([], ConfigError, "a name for every row"),
        ("aa", ConfigError, "'aa' must be a list"),
        (["base"], ConfigError, r"'base' means no adapter.*Write None"),
        (["a", "whole"], RowsError, r"site 'experts.0' of adapter 'whole': experts get single"),
    ],
)
def test_names_that_cannot_be_meant(names, error, message):
    model = Experts()
    tether.attach(model, LoraConfig(rank=2, target_modules="gate"), "a")
    tether.attach(model, LoraConfig(rank=2, target_modules="gate"), "base")
    tether.attach(model, LoraConfig(rank=2), "whole")
    before = state(model)
    with pytest.raises(error, match=message):
        rows(model, names).__enter__()
    assert state(model) == before
    with rows(model, ["a", None]):
        assert [record.active for record in records_of(model)] == [True, False, False]


def test_blocks_nest_and_restore_also_after_an_error(tiny_llama):
    model = adapted(tiny_llama())
    a, b = tether.handles(model).values()
    with tether.reference(model):
        base = bits(logits(model))
    with rows(model, NAMES):
        mixed = bits(logits(model))
    activate(model, "a", weights=[0.5])
    halved, before = bits(logits(model)), state(model)
    with rows(model, NAMES):
        assert bits(logits(model)) == mixed
        assert (a.weight, b.weight) == (1, 1)
        with tether.reference(model):
            assert bits(logits(model)) == base
        a.verify({"input_ids": IDS[:2]})
        activate(model, "b")
        all_b = bits(logits(model))
    with tether.only(model, "b"):
        assert bits(logits(model)) == all_b
    assert state(model) == before
    with rows(model, NAMES):
        with pytest.raises(RowsError), rows(model, ["a", "b"]):
            logits(model)
        assert bits(logits(model)) == mixed
    assert state(model) == before
    assert bits(logits(model)) == halved
    b.offload()
    with pytest.raises(OffloadedError, match="'b' is offloaded"):
        rows(model, NAMES).__enter__()
    assert bits(logits(model)) == halved


def test_disabled_in_a_block_leaves_the_rows_of_the_others(tiny_llama):
    model = adapted(tiny_llama())
    a = tether.handles(model)["a"]
    with rows(model, NAMES), a.disabled():
        found = bits(logits(model))
    with rows(model, [None, None, "b", None, None]):
        assert bits(logits(model)) == found


def test_a_compiled_model_tells_rows_apart():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for name in "ab":
        moved(model, name)
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for names in (["a", "b", None], ["b", None, "a"], ["b", "b", "b"]):
            with rows(model, names):
                torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
        assert bits(compiled(x)) == bits(model(x))
    torch.compiler.reset()
