"""What a model and its adapters hold, counted by hand and by `memory`."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.tensor import distribute_tensor

import tether
from tether import LoraConfig
from tether.memory import NOTE, memory, readable
from tether.value import CHILD

X = torch.linspace(-1, 1, 18).view(3, 6)
# float32 of a 6 -> 8 -> 4 model: weights and biases; rank 2 factors of both sites.
BASE = 4 * (6 * 8 + 8 + 8 * 4 + 4)
FACTORS = 4 * 2 * ((6 + 8) + (8 + 4))


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def anchors(model: nn.Module, name: str) -> list[torch.Tensor]:
    return [b for m in (model[0], model[2]) for b in getattr(m, CHILD)[name].anchor.buffers()]


def shares(found: object) -> set[tuple[str, str, int, bool]]:
    return {(s.owner, s.role, s.bytes, s.offloaded) for s in found.shares}


def test_every_byte_has_an_owner_and_a_use(model):
    tether.attach(model, LoraConfig(rank=2), "anchored")
    plain = tether.attach(model, LoraConfig(rank=2, init="lora"), "plain", dtype=torch.float64)
    with tether.only(model, "plain"):
        model(X).sum().backward()
    found = memory(model)
    assert shares(found) == {
        ("base model", "base", BASE, False),
        ("anchored", "anchor", FACTORS, False),
        ("anchored", "displacement", FACTORS, False),
        ("plain", "displacement", 2 * FACTORS, False),
        ("plain", "gradients", 2 * FACTORS, False),
    }
    assert (found.base, found.anchor, found.displacement, found.gradients) == (
        *(BASE, FACTORS, 3 * FACTORS, 2 * FACTORS),
    )
    assert (found.adapters, found.offloaded, found.files, found.saved) == (6 * FACTORS, 0, 0, 0)
    assert found.devices == {"cpu": BASE + 6 * FACTORS}
    assert shares(plain.memory()) == {s for s in shares(found) if s[0] == "plain"}
    assert memory(nn.ReLU()).shares == ()


def test_whatever_is_trained_counts_as_displacement(model):
    config = LoraConfig(rank=2, target_modules="0", use_dora=True, bias="all", modules_to_save="2")
    handle = tether.attach(model, config)
    site, rows, bias, whole = 4 * 2 * (6 + 8), 4 * 8, 4 * 8, 4 * (8 * 4 + 4)
    assert shares(handle.memory()) == {
        ("default", "anchor", site + rows + bias, False),
        ("default", "displacement", site + rows + bias + whole, False),
    }


def test_a_storage_is_counted_once(model):
    model.append(nn.Linear(6, 8))
    model[3].weight = model[0].weight
    model.register_buffer("whole", torch.zeros(10))
    model.register_buffer("part", model.whole[5:])
    model.register_buffer("nowhere", torch.zeros(7, device="meta"))
    model[0].weight.grad = torch.ones(8, 6)
    found = memory(model)
    assert (found.base, found.gradients) == (BASE + 4 * 8 + 4 * 10, 4 * 48)


def test_of_a_sharded_tensor_the_local_part_is_counted(model, mesh):
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
    assert memory(model).base == BASE


@pytest.mark.parametrize(
    "change",
    [lambda model: model, copy.deepcopy, lambda model: copy.deepcopy(model).to(torch.float64)],
    ids=["attached", "copied", "moved"],
)
def test_equal_anchors_of_a_site_are_one_object_and_counted_once(model, change):
    for name in ("a", "b", "c"):
        tether.attach(model, LoraConfig(rank=2), name)
    tether.attach(model, LoraConfig(rank=2, alpha=1), "other")
    changed = change(model)
    size = FACTORS * (2 if changed[0].weight.dtype == torch.float64 else 1)
    first = anchors(changed, "a")
    for name in ("b", "c"):
        assert all(x is y for x, y in zip(first, anchors(changed, name), strict=True))
    assert all(x is not y for x, y in zip(first, anchors(changed, "other"), strict=True))
    found = memory(changed)
    assert ("shared anchors", "anchor", size, False) in shares(found)
    assert (found.anchor, found.saved) == (2 * size, 2 * size)
    one = tether.handles(changed)["b"].memory()
    assert shares(one) == {
        ("shared anchors", "anchor", size, False),
        ("b", "displacement", size, False),
    }
    assert one.saved == 2 * size


def test_what_is_offloaded_is_told_from_what_is_on_the_model(model, tmp_path):
    handle = tether.attach(model, LoraConfig(rank=2), "a")
    other = tether.attach(model, LoraConfig(rank=2, init="lora"), "b")
    model(X).sum().backward()
    handle.offload("cpu")
    other.offload(tmp_path / "b.safetensors")
    found = memory(model)
    size = (tmp_path / "b.safetensors").stat().st_size
    assert shares(found) == {
        ("base model", "base", BASE, False),
        ("a", "anchor", FACTORS, True),
        ("a", "displacement", FACTORS, True),
        ("a", "gradients", FACTORS, True),
        ("b", "gradients", FACTORS, True),
        ("b", "file", size, True),
    }
    assert (found.adapters, found.offloaded, found.files) == (0, 4 * FACTORS, size)
    assert found.devices == {"cpu": BASE + 4 * FACTORS}
    assert "a (offloaded)" in str(found)
    (tmp_path / "b.safetensors").unlink()
    assert memory(model).files == 0


def test_it_prints_as_a_table(model):
    for name in ("a", "b"):
        tether.attach(model, LoraConfig(rank=2), name)
    found = memory(model)
    lines = str(found).splitlines()
    assert [line.split() for line in lines] == [
        ["memory", "place", "base", "anchor", "displacement", "gradients", "total"],
        ["base", "model", "cpu", "368", "B", "–", "–", "–", "368", "B"],
        ["shared", "anchors", "cpu", "–", "208", "B", "–", "–", "208", "B"],
        ["a", "cpu", "–", "–", "208", "B", "–", "208", "B"],
        ["b", "cpu", "–", "–", "208", "B", "–", "208", "B"],
        ["on", "the", "model", *["368", "B", "208", "B", "416", "B", "0", "B", "992", "B"]],
        ["Sharing", "anchors", "saves", "208", "B.", *NOTE.split()],
    ]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_rich_draws_the_same_table_without_reading_markup(model, tmp_path):
    handle = tether.attach(model, LoraConfig(rank=2), "a")
    handle.offload(tmp_path / "[bold]a[/bold].safetensors")
    console = Console(file=io.StringIO(), width=400)
    console.print(memory(model))
    text = console.file.getvalue()
    assert "[bold]a[/bold].safetensors" in text
    assert NOTE in text
    for title in ("base", "anchor", "displacement", "gradients", "on the model", "368 B"):
        assert title in text


def test_it_becomes_json(model):
    tether.attach(model, LoraConfig(rank=2), "a")
    values = json.loads(json.dumps(memory(model).to_dict()))
    assert values.pop("shares")[1] == {
        "owner": "a",
        "role": "displacement",
        "place": "cpu",
        "bytes": FACTORS,
        "offloaded": False,
    }
    assert values == {
        "base": BASE,
        "anchor": FACTORS,
        "displacement": FACTORS,
        "gradients": 0,
        "offloaded": 0,
        "files": 0,
        "saved": 0,
        "devices": {"cpu": BASE + 2 * FACTORS},
    }


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (10**12, "1.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_readable(size, text):
    assert readable(size) == text


def test_counting_changes_nothing(model):
    handle = tether.attach(model, LoraConfig(rank=2), "a")
    model(X).sum().backward()
    before = {n: (id(t), t._version, id(t.grad)) for n, t in model.named_parameters()}
    memory(model)
    handle.memory()
    assert {n: (id(t), t._version, id(t.grad)) for n, t in model.named_parameters()} == before
