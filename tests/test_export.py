"""save_as_lora says what it wrote, measured on the file, and leaves the live model alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS, small_adapter
from laws.cases import bits, state_of, truth
from tether import Adapter, ConversionReport, LoraConfig
from tether.errors import ConfigError, NonFiniteError, TetherError, UnsupportedAdapterError


class Net(nn.Module):
    """Three sites of different shapes, dropout of its own, and a norm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.BatchNorm1d(20)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(20, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.up(self.tokens(ids)))).relu()
        return self.down(x)


SITES = ["tokens", "up", "down"]


def trained(init: str = "pissa", size: float = 0.01, **settings: object) -> tether.Handle:
    config = {"rank": 3, "alpha": 5, "target_modules": SITES} | settings
    handle = tether.attach(Net(), LoraConfig(init=init, **config))
    for parameter in handle.parameters():
        parameter.data += size * torch.randn(parameter.shape)
    return handle


def change_in_file(folder: Path, site: str) -> tuple[Tensor, int]:
    """ΔW as any reader computes it, in float64, and the number of directions that are not zero."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    names = ("A.weight", "B.weight", "embedding_A", "embedding_B")
    found = (tensors.get(f"{PREFIX}{site}.lora_{name}") for name in names)
    a, b = (tensor.double() for tensor in found if tensor is not None)
    return config["lora_alpha"] / config["r"] * (b @ a), int(a.any(dim=1).sum())


@pytest.mark.parametrize("limits", [{}, {"rank": 2}, {"tolerance": 0.3}, {"rank": 6}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora", "lora"])
def test_the_report_is_what_is_in_the_file(tmp_path, init, dtype, limits):
    handle = trained(init, rank_pattern={"down": 1})
    report = tether.save_as_lora(handle, tmp_path / "lora", dtype=dtype, **limits)
    assert report.path == tmp_path / "lora"
    assert report.dtype == str(dtype or torch.float32).removeprefix("torch.")
    assert list(report.sites) == SITES
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert report.rank == config["r"] == max(site.rank for site in report.sites.values())
    lost = total = 0.0
    for path, layer in handle.snapshot().layers.items():
        exact, (found, rank) = truth(layer), change_in_file(tmp_path / "lora", path)
        error = float((found - exact).norm() / exact.norm())
        assert report.sites[path].rank == rank
        assert report.sites[path].norm == pytest.approx(float(exact.norm()), rel=1e-12)
        assert report.sites[path].error == pytest.approx(error, rel=1e-5, abs=1e-15)
        assert error <= limits.get("tolerance", 1)
        lost, total = lost + (found - exact).norm() ** 2, total + exact.norm() ** 2
    assert report.error == pytest.approx(float((lost / total).sqrt()), rel=1e-5, abs=1e-15)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, 0, 1e-7), (torch.bfloat16, 1e-4, 4e-3), (torch.float16, 1e-5, 5e-4)],
    ids=str,
)
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 1e-7])
def test_no_displacement_is_too_small_for_the_dtype(tmp_path, size, dtype, low, high):
    report = tether.save_as_lora(trained(size=size), tmp_path / "lora", dtype=dtype)
    assert low < report.error < high
    assert all(low < site.error < high for site in report.sites.values())


@pytest.mark.parametrize("init", ["pissa", "lora"])
@pytest.mark.parametrize("limits", [{}, {"rank": 1}, {"tolerance": 0.1}], ids=str)
def test_no_change_yet_is_no_error_and_not_nan(tmp_path, init, limits):
    handle = tether.attach(Net(), LoraConfig(init=init, rank=2, target_modules=SITES))
    report = tether.save_as_lora(handle, tmp_path / "lora", **limits)
    assert report.error == 0
    assert all((site.norm, site.error) == (0, 0) for site in report.sites.values())
    for site in SITES:
        assert not change_in_file(tmp_path / "lora", site)[0].any()


def test_one_site_that_has_not_moved(tmp_path):
    handle = trained()
    for name, parameter in handle.named_parameters():
        if name.startswith("up."):
            parameter.data.zero_()
    report = tether.save_as_lora(handle, tmp_path / "lora", dtype=torch.bfloat16)
    assert report.sites["up"].norm == report.sites["up"].error == 0
    assert 0 < report.error < 4e-3


def test_progress_is_told_for_every_site(tmp_path):
    told = []
    tether.save_as_lora(trained(), tmp_path / "lora", progress=lambda *now: told.append(now))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_handle_and_its_value_are_written_alike(tmp_path):
    handle = trained()
    live = tether.save_as_lora(handle, tmp_path / "a", dtype=torch.float16)
    value = tether.save_as_lora(handle.snapshot(), tmp_path / "b", dtype=torch.float16)
    assert (live.sites, live.rank, live.error) == (value.sites, value.rank, value.error)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("export", ["plain", "half", "reduced", "native", "several"])
def test_training_goes_on_as_if_it_had_not_been_saved(tmp_path, export):
    def train(save: bool) -> tuple[list[bytes], dict[str, object], list[float]]:
        torch.manual_seed(0)
        model = Net().train()
        handle = tether.attach(model, LoraConfig(rank=3, dropout=0.2, target_modules=SITES))
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        losses = []
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.randint(11, (7,))).square().mean()
            loss.backward()
            if save and step in (0, 3):  # between backward and step, where gradients are live
                before = state_of(model)
                write(handle)
                assert state_of(model) == before
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return [bits(p) for p in model.parameters()], state_of(model), losses

    def write(handle: tether.Handle) -> None:
        match export:
            case "plain" | "several":
                tether.save_as_lora(handle, tmp_path / "lora")
            case "half":
                tether.save_as_lora(handle, tmp_path / "lora", dtype=torch.bfloat16)
            case "reduced":
                tether.save_as_lora(handle, tmp_path / "lora", rank=1)
        if export in ("native", "several"):
            handle.save(tmp_path / "a.safetensors")

    straight, saved = train(save=False), train(save=True)
    assert list(tmp_path.iterdir())
    assert straight == saved
    assert straight[2][0] != straight[2][-1]


def broken(adapter: Adapter) -> Adapter:
    layer = adapter.layers["up"]
    layer.trainable.B[2, 0] = torch.nan
    return adapter


REFUSED = {
    "after": (lambda h: h, {"after": "merge"}, ConfigError, "keep, offload, detach, not 'merge'"),
    "rank 0": (lambda h: h, {"rank": 0}, ConfigError, "'tokens': rank 0 must be at least 1"),
    "rank -1": (lambda h: h, {"rank": -1}, ConfigError, "rank -1"),
    "tolerance 0": (lambda h: h, {"tolerance": 0}, ConfigError, "tolerance 0"),
    "tolerance 1": (lambda h: h, {"tolerance": 1.0}, ConfigError, "tolerance 1.0"),
    "tolerance nan": (lambda h: h, {"tolerance": math.nan}, ConfigError, "tolerance nan"),
    "both": (lambda h: h, {"rank": 1, "tolerance": 1e-6}, ConfigError, "'tokens'.*Raise one"),
    "dtype": (lambda h: h, {"dtype": torch.int8}, ConfigError, "int8.*float16"),
    "nan": (lambda h: broken(h.snapshot()), {}, NonFiniteError, "'up'"),
    "nan reduced": (lambda h: broken(h.snapshot()), {"rank": 1}, NonFiniteError, "'up'"),
}


@pytest.mark.parametrize(("source", "settings", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_and_what_was_there_stays(
    tmp_path, source, settings, kind, words
):
    handle = trained()
    tether.save_as_lora(handle, tmp_path / "lora", rank=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    with pytest.raises(kind, match=words):
        tether.save_as_lora(source(handle), tmp_path / "lora", **settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_detached_handle_is_refused(tmp_path):
    handle = trained()
    handle.detach()
    with pytest.raises(TetherError, match="no longer on the model"):
        tether.save_as_lora(handle, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_others_compute_otherwise_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2))
    handle = tether.attach(model, LoraConfig(rank=1, target_modules=["0"]))
    with pytest.raises(UnsupportedAdapterError, match="site '0'"):
        tether.save_as_lora(handle, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_a_value(tmp_path):
    report = tether.save_as_lora(small_adapter(), str(tmp_path / "lora"))
    assert isinstance(report, ConversionReport)
    assert report == tether.save_as_lora(small_adapter(), tmp_path / "lora")
    assert report != replace(report, rank=3)
