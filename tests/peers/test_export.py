"""What save_as_lora writes, peft reads: the same sites, the same outputs, on the unchanged base."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tether
from tether.errors import UnsupportedAdapterError
from tether.methods import names
from tether.value import Adapter

from .conftest import (
    CASES,
    LINEAR,
    Case,
    attached,
    change,
    llama,
    notices_silenced,
    output,
    peft_layers,
    peft_load,
    peft_model,
    peft_save,
    relative,
    weights,
)

PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 6, "*.layers.1.*": 2},
    "alpha_pattern": {"down_proj": 3, "layers.0.mlp.up_proj": 20},
}


def load_exactly(base: nn.Module, folder: Path, sites: tuple[str, ...]) -> peft.PeftModel:
    """peft's reading, checked to make these sites, no others, and to use every tensor."""
    model = peft_load(base, folder)
    assert set(peft_layers(model)) == set(sites)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(state) == set(weights(folder))
    return model


def their_change(model: nn.Module, site: str) -> Tensor:
    """ΔW of peft's layer, in the weight's own shape."""
    return peft_layers(model)[site].get_delta_weight("default").detach()


def check_same_output(
    case: Case, handle: tether.Handle, folder: Path, tolerance: float = 1e-5
) -> peft.PeftModel:
    live = output(handle.model, case.inputs)
    assert relative(live, output(case.build(), case.inputs)) > 0.01
    theirs = load_exactly(case.build(), folder, handle.sites)
    assert relative(output(theirs, case.inputs), live) < tolerance
    return theirs


@pytest.mark.parametrize("init", names())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_method_and_layer(case: Case, init: str, tmp_path: Path) -> None:
    handle = attached(case.build(), init=init, rank=4, alpha=6, target_modules=case.targets)
    tether.save_as_lora(handle, tmp_path / "lora")
    check_same_output(case, handle, tmp_path / "lora")


@pytest.mark.parametrize("init", ["pissa", "olora", "lora"])
def test_rslora_with_patterns_and_mixed_ranks(init: str, tmp_path: Path) -> None:
    case = CASES["linear"]
    settings = PATTERNS | {"init": init, "rank": 3, "alpha": 5, "target_modules": case.targets}
    handle = attached(case.build(), **settings)
    report = tether.save_as_lora(handle, tmp_path / "lora")
    theirs = check_same_output(case, handle, tmp_path / "lora")
    # One rank for all: smaller sites are filled with zero rows.
    most = 6 if init == "lora" else 12
    assert {layer.r["default"] for layer in peft_layers(theirs).values()} == {most} == {report.rank}
    assert {site.rank for site in report.sites.values()} == {most, most // 2, most // 3}
    for site, row in report.sites.items():
        a = peft_layers(theirs)[site].lora_A["default"].weight
        assert int(a.any(dim=1).sum()) == row.rank


@pytest.mark.parametrize("case", [CASES["linear"], CASES["convolutions"]], ids=["linear", "conv"])
def test_mixed_kinds_have_one_canonical_config(case: Case, tmp_path: Path) -> None:
    handle = attached(
        case.build(),
        rank=3,
        alpha=4.5,
        use_rslora=True,
        target_modules=case.targets,
        rank_pattern={case.targets[0]: 2},
        alpha_pattern={case.targets[1]: 1.5},
    )
    tether.save_as_lora(handle, tmp_path / "lora")
    raw = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "r": 6,
        "lora_alpha": 6,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
    }
    assert {key: raw[key] for key in wanted} == wanted
    assert type(raw["lora_alpha"]) is type(raw["r"]) is int
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert isinstance(config, peft.LoraConfig)
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("case", "wanted"), [("conv1d of gpt-2", True), ("linear", False), ("convolutions", False)]
)
def test_fan_in_fan_out_is_written_as_peft_would(case: str, wanted: bool, tmp_path: Path) -> None:
    case = CASES[case]
    model = peft_model(case.build(), target_modules=case.targets)
    assert model.peft_config["default"].fan_in_fan_out is wanted
    tether.save_as_lora(attached(case.build(), rank=2, target_modules=case.targets), tmp_path / "a")
    assert peft.PeftConfig.from_pretrained(tmp_path / "a").fan_in_fan_out is wanted


class Twins(nn.Module):
    """A name that is also the end of another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(64, 64)
        self.block = nn.ModuleDict({"proj": nn.Linear(64, 64), "other": nn.Linear(64, 64)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(nn.functional.one_hot(ids, 64).float())
        return self.block["other"](self.block["proj"](x).tanh())


SUBSETS = {
    "one layer": (Case(llama, LINEAR), {"layers_to_transform": 1}),
    "layers 1 of 1 to 11": (Case(lambda: llama(12), ["q_proj"]), {"layers_to_transform": 1}),
    # More than 20 names: peft shortens the list by itself.
    "many whole paths": (Case(lambda: llama(8), LINEAR), {"layers_to_transform": [0, 2, 5, 7]}),
    "one excluded": (Case(llama, LINEAR), {"exclude_modules": ["layers.0.mlp.up_proj"]}),
    "one whole path": (Case(llama, ["model.layers.1.self_attn.v_proj"]), {}),
    "part of a path": (Case(CASES["bert"].build, ["attention.output.dense"]), {}),
    "inner twin": (Case(Twins, ["block.proj"]), {}),
    "outer twin": (Case(Twins, ["proj"]), {"exclude_modules": ["block.*"]}),
}


@pytest.mark.parametrize(("case", "settings"), SUBSETS.values(), ids=SUBSETS)
def test_only_the_adapted_sites_are_made(case: Case, settings: dict, tmp_path: Path) -> None:
    handle = attached(case.build(), 0.1, rank=2, target_modules=case.targets, **settings)
    tether.save_as_lora(handle, tmp_path / "lora")
    check_same_output(case, handle, tmp_path / "lora")


@pytest.mark.parametrize("source", ["handle", "value", "native file", "peft folder"])
def test_every_source_is_written_alike(source: str, tmp_path: Path) -> None:
    case = CASES["linear"]
    handle = attached(case.build(), rank=4, alpha=6, target_modules=case.targets)
    given: tether.Handle | Adapter = handle
    if source == "value":
        given = handle.snapshot()
    elif source == "native file":
        handle.save(tmp_path / "a.safetensors")
        given = tether.load(tmp_path / "a.safetensors")
    elif source == "peft folder":
        tether.save_as_lora(handle, tmp_path / "first")
        given = tether.load(tmp_path / "first")
    tether.save_as_lora(given, tmp_path / "lora")
    check_same_output(case, handle, tmp_path / "lora")


@pytest.mark.parametrize("after", ["forward", "merged", "resumed"])
def test_the_folder_serves_as_peft_s_own_would(after: str, tmp_path: Path) -> None:
    case = CASES["linear"]
    handle = attached(case.build(), rank=4, alpha=6, target_modules=case.targets)
    live = output(handle.model)
    tether.save_as_lora(handle, tmp_path / "lora")
    theirs = peft_load(case.build(), tmp_path / "lora", is_trainable=after == "resumed")
    if after == "merged":
        assert relative(output(theirs.merge_and_unload()), live) < 1e-5
    elif after == "forward":
        with theirs.disable_adapter():
            assert torch.equal(output(theirs), output(case.build()))
    else:
        trained = [p for p in theirs.parameters() if p.requires_grad]
        theirs(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        assert len(trained) == 2 * len(handle.sites)
        assert all(p.grad.abs().sum() > 0 for p in trained)


def onto_base(folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize(
    "load",
    [
        peft.AutoPeftModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        onto_base,
    ],
    ids=["AutoPeftModel", "AutoModel", "load_adapter"],
)
def test_loaders_that_find_the_base_by_themselves(load: Callable, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    theirs = peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    peft_save(theirs, tmp_path / "theirs")
    tether.save_as_lora(attached(base, rank=4, alpha=6), tmp_path / "ours")
    with notices_silenced():
        start, live = (load(tmp_path / name).eval() for name in ("theirs", "ours"))
    assert torch.equal(output(start), output(llama()))
    assert relative(output(live), output(base)) < 1e-5


@pytest.mark.parametrize("case", [CASES["linear"], CASES["convolutions"]], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("size", [0.05, 1e-4, 1e-6])
def test_half_precision_files(
    case: Case, dtype: torch.dtype, limit: float, size: float, tmp_path
) -> None:
    handle = attached(case.build(), size, rank=4, alpha=6, target_modules=case.targets)
    report = tether.save_as_lora(handle, tmp_path / "lora", dtype=dtype)
    assert {tensor.dtype for tensor in weights(tmp_path / "lora").values()} == {dtype}
    theirs = load_exactly(case.build(), tmp_path / "lora", handle.sites)
    for site, layer in handle.snapshot().layers.items():
        error = relative(their_change(theirs, site), change(layer))
        assert error < limit
        assert error == pytest.approx(report.sites[site].error, rel=0.01)
    base, live = output(case.build(), case.inputs), output(handle.model, case.inputs)
    # The part that the adapter changes, not the logits: those would hide a small one.
    moved = output(theirs, case.inputs) - base
    assert relative(moved, live - base) < 2 * limit + 1e-6 * base.norm() / (live - base).norm()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("case", ["linear", "embedding of gpt-2", "convolutions"])
def test_rank_gives_the_best_approximation(case: str, rank: int, tmp_path: Path) -> None:
    case = CASES[case]
    handle = attached(case.build(), rank=4, alpha=6, target_modules=case.targets)
    report = tether.save_as_lora(handle, tmp_path / "lora", rank=rank)
    theirs = load_exactly(case.build(), tmp_path / "lora", handle.sites)
    assert report.rank == theirs.peft_config["default"].r == rank
    for site, layer in handle.snapshot().layers.items():
        truth = change(layer)
        values = torch.linalg.svdvals(layer.layout.matrix(truth))
        best = float(values[rank:].norm() / values.norm())
        assert relative(their_change(theirs, site), truth) == pytest.approx(best, rel=1e-4)
        assert report.sites[site].error == pytest.approx(best, rel=1e-4)


def test_tolerance_is_met_with_the_smallest_rank(tmp_path: Path) -> None:
    case = CASES["linear"]
    handle = attached(case.build(), rank=4, alpha=6, target_modules=case.targets)
    ranks = []
    for tolerance in (0.6, 0.3, 0.1):
        report = tether.save_as_lora(handle, tmp_path / "lora", tolerance=tolerance)
        theirs = load_exactly(case.build(), tmp_path / "lora", handle.sites)
        for site, layer in handle.snapshot().layers.items():
            truth, kept = change(layer), report.sites[site].rank
            values = torch.linalg.svdvals(truth)
            assert relative(their_change(theirs, site), truth) <= tolerance
            assert values[kept - 1 :].norm() > tolerance * values.norm()  # one less is too few
        ranks.append(report.rank)
    assert all(more > fewer for fewer, more in pairwise(ranks))


class Unusual(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding="same", **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=str)
def test_convolutions_that_peft_computes_otherwise_are_refused(
    settings: dict, tmp_path: Path
) -> None:
    image = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = peft_model(Unusual(**settings), r=2, target_modules=["stem"])
    nn.init.ones_(theirs.base_model.model.stem.lora_B["default"].weight)
    apart = output(theirs, image)
    assert relative(apart, output(theirs.merge_and_unload(), image)) > 0.05

    model = Unusual(**settings)
    base = output(model, image)
    handle = attached(model, rank=2, target_modules=["stem"])
    merged = Unusual(**settings)
    layer = handle.snapshot().layers["stem"]
    merged.stem.weight.data += change(layer)
    assert relative(output(model, image), base) > 0.05
    assert relative(output(model, image), output(merged, image)) < 1e-5
    with pytest.raises(UnsupportedAdapterError, match=r"'stem'.*dilation or padding mode"):
        tether.save_as_lora(handle, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
