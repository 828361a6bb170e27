"""The plain LoRA beside each checkpoint, drift in the log, and quantised bases in a Trainer."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tether
from tether.errors import ConfigError
from tether.integrations.transformers import (
    CheckpointCallback,
    Drift,
    ExportLora,
    ReportDrift,
    adapt,
    allow_quantized,
    measure_drift,
)

from .trainer_runs import (
    BEST,
    SecondIsBest,
    arguments,
    equal,
    losses,
    make_trainer,
    sequences,
)

LORA = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
FLAG = "_hf_peft_config_loaded"


@pytest.fixture
def attached(tiny_llama):
    """Make the tiny model with an adapter."""

    def make(**settings):
        model = tiny_llama()
        tether.attach(model, tether.LoraConfig(**{"rank": 4} | settings))
        return model

    return make


def test_the_lora_is_in_each_checkpoint_and_at_the_end(attached, tmp_path):
    model = attached(after_save="detach")  # which a save in training must not heed
    trainer = make_trainer(model, tmp_path, [ExportLora()])
    trainer.train()
    plain = make_trainer(attached(), tmp_path / "plain")
    plain.train()
    assert equal(trainer.adapter.snapshot(), plain.adapter.snapshot())
    for folder in ("checkpoint-2", "checkpoint-4"):
        lora, exact = tmp_path / folder / "lora", tmp_path / folder / "adapter.safetensors"
        assert {path.name for path in lora.iterdir()} == LORA
        assert tether.compare(tether.load(lora), tether.load(exact)).error < 1e-6
    assert tether.compare(tether.load(tmp_path / "lora"), trainer.adapter.snapshot()).error < 1e-6


def test_the_lora_has_the_rank_and_dtype_asked_for(attached, tmp_path):
    export = ExportLora(rank=2, dtype=torch.bfloat16, at_end=False)
    make_trainer(attached(), tmp_path, [export]).train()
    text = (tmp_path / "checkpoint-4" / "lora" / "adapter_config.json").read_text("utf-8")
    assert '"r": 2' in text
    assert not (tmp_path / "lora").exists()
    from safetensors.torch import load_file

    values = load_file(tmp_path / "checkpoint-4" / "lora" / "adapter_model.safetensors")
    assert {value.dtype for value in values.values()} == {torch.bfloat16}


def test_the_lora_at_the_end_is_of_the_best_adapter(attached, tmp_path):
    callbacks = [ExportLora(tolerance=0.5)]
    make_trainer(attached(), tmp_path, callbacks, SecondIsBest, **BEST).train()
    best = tether.load(tmp_path / "checkpoint-2" / "adapter.safetensors")
    assert 1e-6 < tether.compare(tether.load(tmp_path / "lora"), best).error <= 0.5


def test_drift_is_what_it_says(attached):
    model = attached()
    handle = tether.handles(model)["default"]
    assert measure_drift(handle) == Drift(0.0, 0.0)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    modules = dict(model.named_modules())
    moved = size = 0.0
    ranks = []
    for site, layer in handle.snapshot().layers.items():
        change = tether.algebra.delta(layer).double()
        moved += float(change.square().sum())
        size += float(modules[site].weight.double().square().sum())
        share = torch.linalg.svdvals(change).square()
        share = share[share > 0] / share.sum()
        ranks.append(math.exp(-float((share * share.log()).sum())))
    found = measure_drift(handle)
    # Both in float64, of factors in float32: ΔW formed in float32 differs by its rounding.
    assert found.relative == pytest.approx(math.sqrt(moved / size), rel=1e-5)
    assert found.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    assert 2 < found.effective_rank < 8


def test_one_direction_has_an_effective_rank_of_one(attached):
    model = attached(init="lora", target_modules=["q_proj"])
    handle = tether.handles(model)["default"]
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".B"):
                parameter[:, 0] = 1.0
    assert measure_drift(handle).effective_rank == pytest.approx(1, abs=1e-6)


def test_drift_of_a_base_whose_norm_is_not_known_is_none(attached, tiny_llama, tmp_path):
    model = attached()
    nn.init.normal_(next(iter(tether.handles(model)["default"].parameters())))
    tether.save_as_lora(tether.handles(model)["default"], tmp_path / "lora")
    other = tiny_llama()
    handle = tether.attach(other, tether.load(tmp_path / "lora"))
    found = measure_drift(handle)
    assert found.relative is None
    assert found.effective_rank > 0
    trainer = make_trainer(other, tmp_path, [ReportDrift(every=4)])
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry if "tether/" in key}
    assert keys == {"tether/effective_rank"}


class Logger(TrainerCallback):
    """Stands for whatever logger a Trainer has."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def of(self, key):
        return {step: logs[key] for step, logs in self.logs if key in logs}


@pytest.mark.parametrize(("every", "steps"), [(None, [2, 4]), (1, [1, 2, 3, 4]), (3, [3])])
def test_drift_reaches_the_logger_and_hides_no_loss(attached, tmp_path, every, steps):
    logger = Logger()
    trainer = make_trainer(attached(), tmp_path, [logger, ReportDrift(every)])
    trainer.train()
    assert list(logger.of("loss")) == [1, 2, 3, 4]
    drift = logger.of("tether/drift")
    assert list(drift) == list(logger.of("tether/effective_rank")) == steps
    assert 0 < drift[steps[0]] <= drift[steps[-1]]
    if steps[-1] == 4:
        assert drift[4] == measure_drift(trainer.adapter).relative
    history = [entry for entry in trainer.state.log_history if "tether/drift" in entry]
    assert [entry["step"] for entry in history] == steps


def test_drift_changes_nothing(attached, tmp_path):
    runs = []
    for name, callbacks in (("with", [ReportDrift(every=1)]), ("without", [])):
        runs.append(make_trainer(attached(dropout=0.1), tmp_path / name, callbacks))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    assert equal(runs[0].adapter.snapshot(), runs[1].adapter.snapshot())


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_a_number_of_steps_that_is_none_is_refused(every):
    with pytest.raises(ConfigError, match="every="):
        ReportDrift(every)


def test_a_callback_of_ones_own_writes_into_the_checkpoint(attached, tmp_path):
    class Note(CheckpointCallback):
        """Write a note."""

        def on_checkpoint(self, trainer, handle, folder):
            assert self.trainer is trainer
            (folder / "note.txt").write_text(handle.name, "utf-8")

    make_trainer(attached(), tmp_path, [Note()]).train()
    assert (tmp_path / "checkpoint-4" / "note.txt").read_text("utf-8") == "default"


def quantized(model, *, trainable=True):
    """A model that says that it is quantised, as transformers' loader makes it."""
    model.is_quantized = True
    config = SimpleNamespace(quant_method="made-up")
    model.hf_quantizer = SimpleNamespace(is_trainable=trainable, quantization_config=config)
    model.quantization_method = "made-up"
    return model


def test_a_quantised_base_is_trained_where_the_trainer_alone_refuses(
    attached, tiny_llama, tmp_path
):
    model = quantized(attached())
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)))
    trainer = make_trainer(model, tmp_path)
    assert FLAG not in vars(model)
    assert not getattr(model, FLAG)
    trainer.train()
    plain = make_trainer(attached(), tmp_path / "plain")
    plain.train()
    assert losses(trainer) == losses(plain)


def test_the_flag_goes_also_where_making_the_trainer_fails(attached, tmp_path):
    model = quantized(attached())
    with pytest.raises(ValueError, match="eval"):
        adapt(Trainer)(
            model=model,
            args=TrainingArguments(**arguments(tmp_path, eval_strategy="steps")),
            train_dataset=sequences(),
        )
    assert FLAG not in vars(model)


def test_what_the_trainer_asks_of_quantised_models_is_still_asked(attached, tiny_llama):
    with (
        pytest.raises(ConfigError, match="no gradients through made-up"),
        allow_quantized(quantized(attached(), trainable=False)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no trainable adapter"),
        allow_quantized(quantized(tiny_llama())),
    ):
        pass
    model = attached()
    with allow_quantized(model):
        assert FLAG not in vars(model)
    with (
        pytest.raises(ConfigError, match="compiled"),
        allow_quantized(torch.compile(quantized(model))),
    ):
        pass
