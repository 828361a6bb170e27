"""Many adapters live, beside peft: the same numbers where peft is right, and its error where not.

FIELD.md, "Base overwritten" and "Serving".
"""

from pathlib import Path

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import tether
from tether.errors import BaseMismatchError
from tether.merge import merge, unmerge
from tether.rows import rows
from tether.swap import slot, swap
from tether.switch import activate

from .conftest import (
    IDS,
    LINEAR,
    attached,
    llama,
    notices_silenced,
    output,
    peft_load,
    peft_trained,
    relative,
)


class Both:
    """The same two adapters on two bases: live here, and in peft from the files saved here."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.ours = llama(dtype=dtype)
        settings = {"rank": 4, "alpha": 6, "target_modules": LINEAR}
        a = attached(self.ours, 0.05, "a", **settings)
        b = attached(self.ours, 0.1, "b", **settings | {"init": "lora", "rank": 3, "alpha": 9})
        for handle in (a, b):
            tether.save_as_lora(handle, folder / handle.name)
        self.peer = peft_load(llama(dtype=dtype), folder / "a", adapter_name="a")
        with notices_silenced():
            self.peer.load_adapter(folder / "b", "b")
        self.peer.eval()


@pytest.fixture
def both(tmp_path: Path) -> Both:
    return Both(tmp_path)


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's weights, whatever the library calls them."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name and ".tether." not in name
    }


def test_a_mixed_batch(both: Both) -> None:
    with torch.no_grad():
        wanted = both.peer(IDS, adapter_names=["a", "b", "__base__"]).logits
    with rows(both.ours, ["a", "b", "base"]):
        found = output(both.ours)
    assert relative(found, wanted) < 1e-6
    base = output(llama())
    assert torch.equal(found[2], base[2])
    assert relative(found[0], base[0]) > 0.05
    assert relative(found[1], base[1]) > 0.05


def test_generation_in_a_mixed_batch(both: Both) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(IDS)
    names = ["a", "b", "__base__"]
    wanted = both.peer.generate(input_ids=IDS, adapter_names=names, **settings)
    with rows(both.ours, ["a", "b", "base"]):
        found = both.ours.generate(IDS, **settings)
    assert torch.equal(found, wanted)


def test_several_at_once_with_weights(both: Both) -> None:
    with notices_silenced():
        both.peer.base_model.set_adapter(["a", "b"])
    assert relative(output(both.ours), output(both.peer)) < 1e-6
    both.peer.add_weighted_adapter(["a", "b"], [0.5, 1.5], "c", combination_type="cat")
    both.peer.set_adapter("c")
    activate(both.ours, "a", "b", weights=[0.5, 1.5])
    assert relative(output(both.ours), output(both.peer)) < 1e-6
    both.peer.set_adapter("b")
    activate(both.ours, "b")
    assert relative(output(both.ours), output(both.peer)) < 1e-6


def test_merged(both: Both) -> None:
    both.peer.merge_adapter(["a"])
    activate(both.ours, "a")
    merge(both.ours, "a")
    assert relative(output(both.ours), output(both.peer)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_base_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """peft subtracts what it added: it leaves rounding, each time anew."""
    both = Both(tmp_path, dtype)
    start = bases(both.peer)
    for _ in range(20):
        both.peer.merge_adapter(["a"])
        both.peer.unmerge_adapter()
    left = max(relative(weight, start[name]) for name, weight in bases(both.peer).items())
    assert left > {torch.float32: 1e-8, torch.bfloat16: 1e-3}[dtype]

    start, live = bases(both.ours), output(both.ours)
    for _ in range(20):
        merge(both.ours, "a")
        unmerge(both.ours, "a")
    assert all(torch.equal(weight, start[name]) for name, weight in bases(both.ours).items())
    assert torch.equal(output(both.ours), live)


def test_the_base_beside_several_policies() -> None:
    """In peft "adapter off" is what PiSSA left of the base."""
    base = output(llama())
    settings = {"r": 4, "target_modules": LINEAR, "init_lora_weights": "pissa"}
    peer = peft_trained(llama(), **settings)
    with notices_silenced():
        peer.add_adapter("b", peft.LoraConfig(**settings))
    with peer.disable_adapter():
        assert relative(output(peer), base) > 0.2

    model = llama()
    for name in ("a", "b"):
        attached(model, name=name, rank=4, target_modules=LINEAR)
    assert relative(output(model), base) > 0.05
    with rows(model, ["a", "b", None]), tether.reference(model):
        assert torch.equal(output(model), base)
    merge(model, "a")
    with tether.reference(model):
        assert torch.equal(output(model), base)


def test_swapping(both: Both, tmp_path: Path) -> None:
    """The same outputs; but peft takes an adapter that was made on another base."""
    adapters = {name: handle.detach() for name, handle in tether.handles(both.ours).items()}
    peer = peft_load(llama(), tmp_path / "a")
    place = slot(both.ours, adapters["a"], rank=8)
    hotswap_adapter(peer, str(tmp_path / "b"), adapter_name="default")
    swap(place, adapters["b"])
    assert relative(output(both.ours), output(peer)) < 1e-6

    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= -1
    foreign = attached(other, target_modules=["up_proj"], rank=4)
    tether.save_as_lora(foreign, tmp_path / "foreign")
    hotswap_adapter(peer, str(tmp_path / "foreign"), adapter_name="default")
    assert relative(output(peer), output(other)) > 0.2
    before = output(both.ours)
    with pytest.raises(BaseMismatchError, match=r"site 'model.layers.0.mlp.up_proj'"):
        swap(place, foreign.snapshot())
    assert torch.equal(output(both.ours), before)
