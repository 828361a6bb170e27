"""Training with DoRA, biases and whole modules: resumed, it is the uninterrupted run, bitwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tether
from laws.cases import bits
from tether.errors import HeaderError
from tether.training import checkpoint, loop
from tether.training.settings import Settings

from .conftest import Live, examples

SETTINGS = {
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"], "init": "lora"},
    "everything": {
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["model.norm", "lm_head"],
        "dropout": 0.2,
    },
}


@pytest.fixture
def run(tiny_llama: Callable[..., torch.nn.Module]) -> Callable[..., Live]:
    """Make a run in memory over a model with biases, the same every time."""

    def make(lora: dict[str, object]) -> Live:
        config = tether.LoraConfig(**{"rank": 2} | lora)
        settings = Settings(learning_rate=1e-2, weight_decay=0.1, steps=30, lora=config)
        torch.manual_seed(0)
        model = tiny_llama(initializer_range=0.15, attention_bias=True, mlp_bias=True)
        handle = tether.attach(model, config)
        return Live(model, handle, loop.make_optimizer(handle, settings), settings)

    return make


@pytest.mark.parametrize("lora", SETTINGS.values(), ids=SETTINGS)
def test_resumed_is_uninterrupted_bit_for_bit(lora, run, tmp_path: Path):
    straight, data = run(lora), examples(8)
    base = {n: bits(p) for n, p in straight.model.named_parameters() if ".tether." not in n}
    start = [bits(p) for p in straight.handle.parameters()]
    steps = straight.train(data, until=6)

    first = run(lora)
    assert first.train(data, until=3) == steps[:3]
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, first.handle, first.optimizer, 3)
    tether.save(first.handle.snapshot(), tmp_path / "a.safetensors")

    resumed = run(lora)
    resumed.handle.detach()
    resumed.handle = tether.attach(resumed.model, tether.load(tmp_path / "a.safetensors"))
    resumed.optimizer = loop.make_optimizer(resumed.handle, resumed.settings)
    torch.manual_seed(9)
    assert checkpoint.load(path, resumed.handle, resumed.optimizer) == 3
    assert all(map(torch.equal, first.state(), resumed.state()))
    assert resumed.train(data, first=3, until=6) == steps[3:]
    assert all(map(torch.equal, straight.state(), resumed.state()))
    assert all(
        bits(p) != old for p, old in zip(resumed.handle.parameters(), start, strict=True)
    )  # all of it is trained
    assert {n: bits(p) for n, p in straight.model.named_parameters() if ".tether." not in n} == base


def test_the_loss_falls_and_the_optimizer_holds_all_that_is_trained(run):
    live = run(SETTINGS["everything"] | {"dropout": 0.0})
    names = [name.rpartition(".")[2] for name, _ in live.handle.named_parameters()]
    # 14 projections, two of three parameters of the saved modules, no other norm has a bias.
    assert {name: names.count(name) for name in ("dA", "dB", "dm", "db", "weight")} == {
        **dict.fromkeys(("dA", "dB", "dm", "db"), 14),
        "weight": 2,
    }
    (group,) = live.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, live.handle.parameters()))
    losses = [step.loss for step in live.train(examples(8))]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("other", ["dora", "head"])
def test_a_checkpoint_of_other_parts_is_refused_and_changes_nothing(other, run, tmp_path: Path):
    one = run(SETTINGS["everything"])
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, one.handle, one.optimizer, 0)
    two = run(SETTINGS[other])
    before = two.state()
    with pytest.raises(HeaderError, match=f"{path}: tensor"):
        checkpoint.load(path, two.handle, two.optimizer)
    assert all(map(torch.equal, before, two.state()))
