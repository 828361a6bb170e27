"""Combining beside peft's add_weighted_adapter: the same where it works on ΔW, better elsewhere.

peft combines adapters of a live model; ours are read from the folders that peft saved.
"""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import tether
from tether import combine

from .conftest import (
    CASES,
    Case,
    change,
    disturb,
    gpt2,
    llama,
    notices_silenced,
    peft_layers,
    peft_model,
    peft_save,
    relative,
)

SQUARE = Case(llama, ["q_proj", "o_proj"])  # of full rank 32
NAMES = ("one", "two", "three")
EVEN, UNEVEN = (0.5, 0.5, 0.5), (0.7, -0.4, 1.5)


class Peer:
    """A peft model with three adapters, and the same three read by tether."""

    def __init__(self, case: Case, folder: Path, alphas: tuple[int, ...] = (6, 6, 6)) -> None:
        # Said here: peft does not write into the configs of later adapters what it found out.
        stored_in_out = case.build is gpt2
        settings = {"target_modules": case.targets, "r": 3, "fan_in_fan_out": stored_in_out}
        self.model = peft_model(case.build(), lora_alpha=alphas[0], **settings)
        with notices_silenced():
            self.model.add_adapter(NAMES[0], peft.LoraConfig(lora_alpha=alphas[0], **settings))
            for name, alpha in zip(NAMES[1:], alphas[1:], strict=True):
                self.model.add_adapter(name, peft.LoraConfig(lora_alpha=alpha, **settings))
        disturb((p for n, p in self.model.named_parameters() if "lora_" in n), 0.2)
        self.ours = self.save(folder)

    def save(self, folder: Path) -> list[tether.Adapter]:
        """The three adapters now, read by tether from what peft writes."""
        peft_save(self.model, folder, selected_adapters=list(NAMES))
        return [tether.load(folder / name) for name in NAMES]

    def combined(self, kind: str, weights: tuple[float, ...], **settings: object) -> dict:
        """Site -> ΔW of peft's combination, in the weight's own shape."""
        name = f"combined-{kind}"
        with notices_silenced():
            self.model.add_weighted_adapter(list(NAMES), list(weights), name, kind, **settings)
        return {
            site: layer.get_delta_weight(name).double()
            for site, layer in peft_layers(self.model).items()
        }


def ours(result: combine.Combined) -> dict[str, Tensor]:
    return {site: change(layer) for site, layer in result.adapter.layers.items()}


def exact(peer: Peer, weights: tuple[float, ...]) -> dict[str, Tensor]:
    return {
        site: sum(w * change(a.layers[site]) for w, a in zip(weights, peer.ours, strict=True))
        for site in peer.ours[0].layers
    }


def largest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of any site."""
    assert found.keys() == wanted.keys()
    return max(relative(found[site], wanted[site]) for site in wanted)


@pytest.mark.parametrize(
    "case", ["linear", "conv1d of gpt-2", "embedding of gpt-2", "convolutions"]
)
def test_cat_is_the_same_change(case: str, tmp_path: Path) -> None:
    peer = Peer(CASES[case], tmp_path, (6, 3, 12))
    theirs = peer.combined("cat", UNEVEN)
    result = combine.cat(peer.ours, UNEVEN)
    assert largest(theirs, exact(peer, UNEVEN)) < 1e-6
    assert largest(ours(result), exact(peer, UNEVEN)) < 1e-6
    assert {site.rank for site in result.sites.values()} == {9}


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("case", ["linear", "conv1d of gpt-2"])
def test_svd_is_the_same_change_without_the_dense_matrix(
    case: str, rank: int, tmp_path: Path
) -> None:
    peer = Peer(CASES[case], tmp_path, (6, 3, 12))
    theirs = peer.combined("svd", UNEVEN, svd_rank=rank)
    result = combine.svd(peer.ours, UNEVEN, rank=rank)
    assert largest(ours(result), theirs) < 1e-4
    for site, wanted in exact(peer, UNEVEN).items():
        assert result.sites[site].error == pytest.approx(
            relative(theirs[site], wanted), rel=1e-4, abs=1e-6
        )


def test_ties_of_the_changes_is_the_same_for_equal_weights(tmp_path: Path) -> None:
    peer = Peer(CASES["linear"], tmp_path)
    theirs = peer.combined("ties_svd", EVEN, svd_rank=5, density=0.4)
    assert largest(ours(combine.ties(peer.ours, EVEN, density=0.4, rank=5)), theirs) < 1e-4


def test_an_equal_vote_goes_to_the_larger_sum(tmp_path: Path) -> None:
    """Trimming leaves two voters at many entries; peft gives those to the positive one."""
    peer = Peer(SQUARE, tmp_path)
    settings = {"density": 0.4, "svd_rank": 32, "majority_sign_method": "frequency"}
    theirs = peer.combined("ties_svd", EVEN, **settings)
    result = combine.ties(peer.ours, EVEN, density=0.4, rank=32, majority="frequency")
    for site, found in ours(result).items():
        apart = (found - theirs[site]).abs() > 1e-4 * theirs[site].abs().max()
        assert 0.01 < int(apart.sum()) / apart.numel() < 0.3
        assert bool((theirs[site][apart] > 0).all())
        assert bool((found[apart] < 0).all())


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_a_negative_weight_votes_against(tmp_path: Path) -> None:
    """What is subtracted pulls the other way: the larger part wins, and is not averaged with it.

    peft elects before it weighs; there both agree, and a quarter of the larger part is left.
    """
    peer = Peer(SQUARE, tmp_path / "before")
    for layer in peft_layers(peer.model).values():
        layer.lora_A["two"].weight.data = layer.lora_A["one"].weight.data.clone()
        layer.lora_B["two"].weight.data = layer.lora_B["one"].weight.data / 2
        layer.lora_B["three"].weight.data.zero_()
    values = peer.save(tmp_path / "after")
    weights = (1.0, -1.0, 1.0)
    wanted = {site: change(layer) for site, layer in values[0].layers.items()}
    found = ours(combine.ties(values, weights, density=1.0, rank=32))
    assert largest(found, wanted) < 1e-5
    theirs = peer.combined("ties_svd", weights, svd_rank=32, density=1.0)
    assert largest(theirs, {site: value / 4 for site, value in wanted.items()}) < 1e-5


def test_dare_without_dropping_is_the_same_change(tmp_path: Path) -> None:
    peer = Peer(CASES["linear"], tmp_path)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        theirs = peer.combined("dare_linear_svd", UNEVEN, svd_rank=4, density=1.0)
    result = combine.dare(peer.ours, UNEVEN, rank=4, density=1.0)
    assert largest(ours(result), theirs) < 1e-4


def test_dare_drops_other_entries_in_every_call_of_the_peer(tmp_path: Path) -> None:
    peer = Peer(CASES["linear"], tmp_path)
    settings = {"density": 0.5, "svd_rank": 4}
    first = peer.combined("dare_linear_svd", EVEN, **settings)
    peer.model.delete_adapter("combined-dare_linear_svd")
    second = peer.combined("dare_linear_svd", EVEN, **settings)
    assert largest(first, second) > 0.1
    one, two = (ours(combine.dare(peer.ours, EVEN, rank=4, density=0.5)) for _ in range(2))
    assert all(torch.equal(one[site], two[site]) for site in one)


def test_linear_is_the_sum_and_the_peers_has_cross_terms(tmp_path: Path) -> None:
    peer = Peer(CASES["linear"], tmp_path)
    wanted = exact(peer, EVEN)
    assert largest(ours(combine.linear(peer.ours, EVEN)), wanted) < 1e-6
    theirs = peer.combined("linear", EVEN)
    errors = [relative(theirs[site], wanted[site]) for site in wanted]
    # Of nine products Bᵢ·Aⱼ six belong to no adapter: √6/√3 of the sum's size.
    assert min(errors) > 0.9
    assert sum(errors) / len(errors) == pytest.approx(2**0.5, rel=0.15)


def test_the_change_of_equal_adapters_depends_on_their_factors_in_the_peers_ties(
    tmp_path: Path,
) -> None:
    """B·A = (−B)·(−A): the same adapter, written otherwise, must be combined alike."""
    peer = Peer(CASES["linear"], tmp_path)

    def turn() -> None:
        for layer in peft_layers(peer.model).values():
            for factor in (layer.lora_A["two"], layer.lora_B["two"]):
                factor.weight.data.neg_()

    before = peer.combined("ties", EVEN, density=0.5)
    mine = ours(combine.ties(peer.ours, EVEN, density=0.5, rank=4))
    turn()
    peer.model.delete_adapter("combined-ties")
    after = peer.combined("ties", EVEN, density=0.5)
    turned = peer.save(tmp_path / "turned")
    assert largest(after, before) > 0.3
    assert largest(ours(combine.ties(turned, EVEN, density=0.5, rank=4)), mine) < 1e-5


def test_the_peer_loads_a_combination_and_gives_the_same_output(tmp_path: Path) -> None:
    case = CASES["linear"]
    peer = Peer(case, tmp_path)
    result = combine.svd(peer.ours, UNEVEN, rank=4)
    tether.save_as_lora(result.adapter, tmp_path / "combined")
    base: nn.Module = case.build()
    with notices_silenced():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "combined").eval()
    theirs = {s: layer.get_delta_weight("default") for s, layer in peft_layers(loaded).items()}
    assert largest(theirs, ours(result)) < 1e-6
