"""save_as_lora beside its live model: the check, what becomes of the adapter, what rank costs."""

import json
from pathlib import Path

import pytest
import torch

import tether
from laws.cases import bits, state_of
from tether import LoraConfig, export
from tether.errors import ConfigError, MergedError, VerificationError

BATCH = {"input_ids": torch.arange(24).view(2, 12) % 32}


def trained(model, name="default", steps=3, **settings):
    settings = {"rank": 4, "modules_to_save": ["model.norm"]} | settings
    handle = tether.attach(model, LoraConfig(**settings), name=name)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
    return handle, optimizer


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_the_logits_of_base_and_file_are_compared(tiny_llama, tmp_path, init, dora):
    model = tiny_llama().train()
    handle, _ = trained(model, init=init, use_dora=dora)
    before, modes = state_of(model), [module.training for module in model.modules()]
    noise = torch.get_rng_state()
    report = tether.save_as_lora(handle, tmp_path / "lora", verify=BATCH)
    assert state_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), noise)
    assert list(tether.handles(model)) == ["default"]
    model.eval()
    live = logits(model)
    handle.detach()
    tether.attach(model, tether.load(tmp_path / "lora"))
    there = logits(model)
    error = float((live - there).double().norm() / live.double().norm())
    assert report.verification.error == pytest.approx(error, rel=0.5, abs=1e-7)
    largest = float((live - there).abs().max())
    assert report.verification.largest == pytest.approx(largest, rel=0.5, abs=1e-7)
    assert largest < 1e-5
    assert report.verification.tolerance == 1e-3
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_the_loss_is_measured_for_the_base_the_live_model_and_three_ranks(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    handle, _ = trained(model, steps=8)
    batch = BATCH | {"labels": BATCH["input_ids"]}
    report = tether.save_as_lora(handle, tmp_path / "lora", verify=batch)
    losses = report.verification.losses
    assert list(losses) == ["base", "live", "rank 8", "rank 4", "rank 2"]
    with torch.no_grad():
        assert losses["live"] == float(model(**batch).loss)
        with tether.reference(model):
            assert losses["base"] == float(model(**batch).loss)
    assert losses["rank 8"] == pytest.approx(losses["live"], abs=1e-6)
    assert losses["live"] < losses["base"] - 0.1
    cut = tether.to_lora(handle.snapshot(), 2)
    handle.detach()
    tether.attach(model, cut)
    with torch.no_grad():
        assert losses["rank 2"] == float(model(**batch).loss) != losses["rank 8"]
    # Without labels: the next tokens of input_ids, where attention_mask says so.
    masked = BATCH | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    tether.handles(model)["default"].detach()
    handle, _ = trained(model)
    found = tether.save_as_lora(handle, tmp_path / "lora", verify=masked).verification.losses
    with torch.no_grad():
        own = float(model(**batch).loss)
    assert found["live"] == pytest.approx(own, abs=1e-5)


def test_a_file_that_differs_is_not_published(tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama().eval()
    handle, _ = trained(model)
    tether.save_as_lora(handle, tmp_path / "lora", verify=BATCH)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    with pytest.raises(VerificationError, match=r"relative error of the logits .* above 1e-12"):
        tether.save_as_lora(
            handle, tmp_path / "lora", dtype=torch.bfloat16, verify=BATCH, verify_tolerance=1e-12
        )
    plain = export.algebra.compress

    def wrong(layer, *limits):
        done = plain(layer, *limits)
        done.layer.trainable.A.mul_(1.5)
        return done

    monkeypatch.setattr(export.algebra, "compress", wrong)
    with pytest.raises(VerificationError, match="Nothing was published"):
        tether.save_as_lora(handle, tmp_path / "lora", verify=BATCH)
    monkeypatch.undo()
    now = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    assert now == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert list(tether.handles(model)) == ["default"]


def test_other_adapters_on_the_model_do_not_disturb_the_check(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    first, _ = trained(model)
    with tether.only(model):
        second, _ = trained(model, name="default-0")
    with tether.only(model, "default"):
        report = tether.save_as_lora(second, tmp_path / "lora", verify=BATCH)
        assert (first.active, second.active) == (True, False)
    assert report.verification.error < 1e-5
    assert list(tether.handles(model)) == ["default", "default-0"]


def test_verifying_needs_a_live_model_with_logits(tiny_llama, tmp_path):
    model = tiny_llama()
    handle, _ = trained(model)
    with pytest.raises(ConfigError, match="needs a live adapter"):
        tether.save_as_lora(handle.snapshot(), tmp_path / "lora", verify=BATCH)
    layer = torch.nn.Sequential(torch.nn.LSTM(4, 4), torch.nn.Identity())
    layer.append(torch.nn.Linear(4, 4))

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4)

        def forward(self, x):
            return (self.up(x),)

    odd = tether.attach(Odd(), LoraConfig(rank=1, target_modules=["up"]))
    with pytest.raises(ConfigError, match="gives tuple, without logits"):
        tether.save_as_lora(odd, tmp_path / "lora", verify=torch.ones(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_keeping_is_the_default_and_leaves_everything(tiny_llama, tmp_path):
    one, two = tiny_llama(), tiny_llama()
    handles = [trained(model)[0] for model in (one, two)]
    optimizers = [torch.optim.AdamW(handle.parameters(), lr=1e-2) for handle in handles]
    report = tether.save_as_lora(handles[0], tmp_path / "lora", verify=BATCH)
    assert report.after == "keep"
    for model, optimizer in zip((one, two), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            optimizer.step()
    pairs = zip(*(handle.named_parameters() for handle in handles), strict=True)
    assert all(bits(mine) == bits(other) for (_, mine), (_, other) in pairs)


def test_detaching_afterwards_leaves_the_base(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    base, before = logits(model), state_of(model)
    handle, _ = trained(model)
    model.zero_grad()
    report = tether.save_as_lora(handle, tmp_path / "lora", after="detach")
    assert report.after == "detach"
    assert tether.handles(model) == {}
    assert state_of(model) == before
    assert torch.equal(logits(model), base)


def test_offloading_a_merged_adapter_is_refused_before_anything_is_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    handle = tether.attach(model, LoraConfig(rank=2, target_modules=["0"]))
    tether.merge(model, "default")
    with pytest.raises(MergedError, match=r"tether\.unmerge\(model, 'default'\) first"):
        tether.save_as_lora(handle, tmp_path / "lora", after="offload")
    assert list(tmp_path.iterdir()) == []
    assert tether.save_as_lora(handle, tmp_path / "lora").after == "keep"


def test_offloading_afterwards_frees_the_factors_and_brings_them_back(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    base = logits(model)
    handle, _ = trained(model)
    live = logits(model)
    report = tether.save_as_lora(
        handle, tmp_path / "lora", after="offload", offload_to=tmp_path / "parked.safetensors"
    )
    assert report.after == "offload"
    assert all(parameter.numel() == 0 for parameter in handle.parameters())
    assert torch.equal(logits(model), base)
    handle.restore()
    assert torch.equal(logits(model), live)


def test_a_refused_file_keeps_the_adapter(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    handle, _ = trained(model)
    with pytest.raises(VerificationError):
        tether.save_as_lora(
            handle,
            tmp_path / "lora",
            dtype=torch.bfloat16,
            after="detach",
            verify=BATCH,
            verify_tolerance=0.0,
        )
    assert handle.attached


def test_what_becomes_of_the_adapter_can_be_set_with_its_config(tiny_llama, tmp_path):
    model = tiny_llama()
    handle, _ = trained(model, after_save="detach")
    value = handle.snapshot()
    # A value has nothing to take off.
    assert tether.save_as_lora(value, tmp_path / "value").after == "keep"
    assert tether.save_as_lora(handle, tmp_path / "kept", after="keep").after == "keep"
    assert handle.attached
    assert tether.save_as_lora(handle, tmp_path / "lora").after == "detach"
    assert not handle.attached
    with pytest.raises(ConfigError, match="needs a live adapter"):
        tether.save_as_lora(value, tmp_path / "value", after="detach")


def test_the_curve_says_what_every_rank_leaves_out(tiny_llama, tmp_path):
    handle, _ = trained(tiny_llama(), rank=3)
    report = tether.save_as_lora(handle, tmp_path / "lora")
    assert list(report.curve) == [1, 2, 4, 6]
    for rank in (1, 2, 4):
        cut = tether.save_as_lora(handle, tmp_path / "cut", rank=rank)
        assert report.curve[rank] == pytest.approx(cut.error, rel=1e-5)
    assert report.curve[6] == 0
    assert "cut to rank 1: " in str(report)


def test_rounding_of_what_is_trained_whole_is_reported(tiny_llama, tmp_path):
    handle, _ = trained(tiny_llama())
    assert tether.save_as_lora(handle, tmp_path / "lora").wholes["model.norm.weight"] < 1e-6
    report = tether.save_as_lora(handle, tmp_path / "lora", dtype=torch.bfloat16)
    value = handle.snapshot().modules["model.norm"]["weight"]
    lost = value.current.bfloat16().double() - value.anchor.double() - value.trainable.double()
    error = float(lost.norm() / value.trainable.double().norm())
    assert report.wholes["model.norm.weight"] == pytest.approx(error, rel=1e-6)
    assert error > 1e-3


def test_nothing_else_is_a_source(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Linear is no adapter\. Give a handle"):
        tether.save_as_lora(torch.nn.Linear(2, 2), tmp_path / "lora")
