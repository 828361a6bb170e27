"""An adapter in transformers' Trainer: what it saves, how it goes on, and what it refuses."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import tether
from tether import methods
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    DigestError,
    MissingExtraError,
    NotAnAdapterError,
    OffloadedError,
    ShapeMismatchError,
    WriteError,
)
from tether.integrations.transformers import (
    ADAPTER_FILE,
    AdapterTrainer,
    CheckpointCallback,
    adapt,
    last_adapter,
)
from tiny_model import make_tokenizer

from .trainer_runs import (
    BEST,
    STATE,
    SecondIsBest,
    arguments,
    equal,
    losses,
    make_trainer,
    tensors,
)

METHODS = ["pissa", "olora", "milora", "lora", "gaussian", "orthogonal"]


@pytest.fixture
def attached(tiny_llama):
    """Make the tiny model with an adapter."""

    def make(adapter=None, **settings):
        model = tiny_llama()
        tether.attach(model, adapter or tether.LoraConfig(**{"rank": 4} | settings))
        return model

    return make


def test_a_class_is_adapted_once_and_stays_what_it_was():
    class Mine(Trainer):
        """A user's own."""

    adapted = adapt(Mine)
    assert adapted is adapt(Mine)
    assert adapt(adapted) is adapted
    assert issubclass(adapted, AdapterTrainer)
    assert issubclass(adapted, Mine)
    assert adapted.__name__ == "AdaptedMine"

    class Mixed(AdapterTrainer, Trainer):
        """A user's own, made from the mixin."""

    assert adapt(Mixed) is Mixed


@pytest.mark.parametrize("wrong", [nn.Module, TrainingArguments, "Trainer", None])
def test_what_is_no_trainer_is_refused(wrong):
    with pytest.raises(ConfigError, match="no Trainer class"):
        adapt(wrong)


def test_a_model_without_an_adapter_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"no trainable adapter of tether's.*tether\.attach"):
        make_trainer(tiny_llama(), tmp_path)
    model = tiny_llama()
    tether.attach(model, tether.LoraConfig(rank=2), name="still", trainable=False)
    with pytest.raises(ConfigError, match="1 frozen: 'still'"):
        make_trainer(model, tmp_path)
    with pytest.raises(ConfigError, match="'some/name' is a name"):
        make_trainer("some/name", tmp_path)


def test_several_adapters_are_refused_unless_one_is_trained(attached, tmp_path):
    model = attached()
    tether.attach(model, tether.LoraConfig(rank=2), name="other")
    with pytest.raises(ConfigError, match="2 trainable adapters: 'default', 'other'"):
        make_trainer(model, tmp_path)
    tether.handles(model)["other"].detach()
    tether.attach(model, tether.LoraConfig(rank=2), name="other", trainable=False)
    assert make_trainer(model, tmp_path).adapter.name == "default"


def test_a_setting_of_another_meaning_is_left_alone(attached, tmp_path):
    class Weighted(Trainer):
        """Some other beta."""

        def __init__(self, *, args, **kwargs):
            super().__init__(args=args, **kwargs)
            self.beta = args.beta  # as it was while the trainer was made

    args = TrainingArguments(**arguments(tmp_path))
    args.beta = 0.5
    trainer = adapt(Weighted)(model=attached(), args=args)
    assert (trainer.beta, hasattr(trainer, "ref_model")) == (0.5, False)


def test_a_base_that_would_be_trained_and_not_saved_is_refused(attached, tmp_path):
    model = attached()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'model.norm.weight' of the base would be trained"):
        make_trainer(model, tmp_path)


@pytest.mark.parametrize("name", ["_save", "_get_output_dir", "_finalize_training"])
def test_a_version_without_a_method_that_is_overridden_is_refused(
    attached, tmp_path, monkeypatch, name
):
    model = attached()
    monkeypatch.setattr(Trainer, f"{name}_renamed", getattr(Trainer, name), raising=False)
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(ConfigError, match=f"no Trainer.{name}, .*5.23"):
        make_trainer(model, tmp_path)


def test_a_checkpoint_holds_the_adapter_and_no_base(tiny_llama, tmp_path):
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    handle = tether.attach(model, tether.LoraConfig(rank=16))
    trainer = make_trainer(model, tmp_path)
    trainer.processing_class = make_tokenizer()
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    left = {path.name for path in folder.iterdir()} - tokenizer - {"chat_template.jinja"}
    assert left == {ADAPTER_FILE, *STATE}
    factors = sum(tensor.nbytes for _, tensor in tensors(handle.snapshot()))
    assert factors < (folder / ADAPTER_FILE).stat().st_size < 1.05 * factors
    stored = tether.load(folder / ADAPTER_FILE)
    assert equal(stored, handle.snapshot())
    assert (stored.provenance.steps, stored.provenance.learning_rate) == (4, 1e-2)
    # The optimizer's state is of the displacement alone: two moments of half the factors.
    assert (folder / "optimizer.pt").stat().st_size < 1.1 * factors
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_saving_changes_nothing(attached, tmp_path):
    runs = []
    for strategy in ("steps", "no"):
        trainer = make_trainer(attached(dropout=0.1), tmp_path / strategy, save_strategy=strategy)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    assert equal(runs[0].adapter.snapshot(), runs[1].adapter.snapshot())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    attached, tmp_path, monkeypatch, method
):
    whole = make_trainer(attached(init=method, dropout=0.1), tmp_path)
    whole.train()
    wanted = whole.adapter.snapshot()
    shutil.rmtree(tmp_path / "checkpoint-4")

    def start(*_, **__):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(type(methods.get(method)), "start", start)
    torch.manual_seed(5)
    again = make_trainer(attached(last_adapter(tmp_path)), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert len(losses(again)) == 4
    assert losses(again) == losses(whole)
    assert equal(again.adapter.snapshot(), wanted)
    assert not equal(tether.load(tmp_path / "checkpoint-2" / ADAPTER_FILE), wanted)


def test_what_is_trained_whole_resumes_bit_for_bit_too(attached, tmp_path):
    settings = {"use_dora": True, "modules_to_save": ["norm"], "init": "olora"}
    whole = make_trainer(attached(**settings), tmp_path)
    whole.train()
    # checkpoint-4 is there: the resumed run replaces it.
    again = make_trainer(attached(**settings), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    names = [name for name, _ in tensors(whole.adapter.snapshot())]
    assert "model.norm.weight" in names
    assert any(name.endswith("magnitude") for name in names)
    assert equal(again.adapter.snapshot(), whole.adapter.snapshot())
    assert equal(last_adapter(tmp_path), whole.adapter.snapshot())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_the_anchor_too_comes_from_the_file_and_only_to_this_adapter(attached, tmp_path):
    trainer = make_trainer(attached(), tmp_path)
    trainer.train()
    stored = last_adapter(tmp_path)
    # As a decomposition on another machine would: the same but for the last bits.
    site, layer = next(iter(stored.layers.items()))
    apart = tether.Factors(layer.anchor.A * (1 + 1e-6), layer.anchor.B)
    layers = dict(stored.layers) | {
        site: tether.LayerAdapter(layer.trainable, apart, layer.scaling, layer.layout)
    }
    model = attached(copy.copy(stored))
    tether.handles(model)["default"].detach()
    moved = tether.Adapter(layers, stored.provenance, stored.config, stored.targets)
    tether.attach(model, moved)
    other = tether.attach(model, moved, name="other", trainable=False)
    before = other.snapshot()
    again = make_trainer(model, tmp_path)
    assert not equal(again.adapter.snapshot(), stored)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    assert equal(again.adapter.snapshot(), stored)
    assert equal(other.snapshot(), before)


@pytest.mark.parametrize(("limit", "kept"), [(1, ["2"]), (2, ["2", "6"]), (None, ["2", "4", "6"])])
def test_the_best_adapter_is_restored_bit_for_bit(attached, tmp_path, limit, kept):
    settings = BEST | {"save_total_limit": limit, "max_steps": 6}
    trainer = make_trainer(attached(), tmp_path, trainer_class=SecondIsBest, **settings)
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert equal(trainer.adapter.snapshot(), tether.load(best / ADAPTER_FILE))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in kept]
    # It is named as it was published, also in its own state.
    for number in kept:
        path = tmp_path / f"checkpoint-{number}" / "trainer_state.json"
        assert json.loads(path.read_text("utf-8"))["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize(("limit", "kept"), [(1, ["6"]), (2, ["4", "6"]), (None, ["2", "4", "6"])])
def test_the_oldest_checkpoints_go(attached, tmp_path, limit, kept):
    make_trainer(attached(), tmp_path, max_steps=6, save_total_limit=limit).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in kept]


def test_only_a_process_that_may_write_writes(attached, tmp_path):
    class Second(TrainingArguments):
        """Of the second of two processes, the first on its node."""

        process_index = property(lambda self: 1)

    trainer = make_trainer(attached(), tmp_path)
    trainer.args.__class__ = Second
    trainer.save_model(str(tmp_path / "second"))
    assert not (tmp_path / "second").exists()
    trainer.args.save_on_each_node = True
    trainer.save_model(str(tmp_path / "second"))
    assert (tmp_path / "second" / ADAPTER_FILE).is_file()


def test_save_model_writes_the_adapter_and_the_tokenizer(attached, tmp_path):
    trainer = make_trainer(attached(), tmp_path / "run")
    trainer.processing_class = make_tokenizer()
    trainer.save_model(str(tmp_path / "end"))
    names = {path.name for path in (tmp_path / "end").iterdir()}
    assert names >= {ADAPTER_FILE, "tokenizer.json"}
    assert not any("model" in name or name.endswith(".bin") for name in names)
    assert equal(tether.load(tmp_path / "end" / ADAPTER_FILE), trainer.adapter.snapshot())
    trainer.save_model()
    assert (tmp_path / "run" / ADAPTER_FILE).is_file()


def test_a_push_gets_the_published_checkpoint_and_the_adapter(attached, tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        path = Path(folder)
        pushed.append((path.name, path.parent == tmp_path, (path / ADAPTER_FILE).is_file()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(attached(), tmp_path)
    trainer.args.push_to_hub = True
    trainer.state.global_step = 4
    trainer.optimizer = torch.optim.AdamW(trainer.adapter.parameters())
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    trainer._save_checkpoint(trainer.model, None)
    assert pushed == [("checkpoint-4", True, True)]
    assert equal(tether.load(tmp_path / ADAPTER_FILE), trainer.adapter.snapshot())


def test_a_save_that_fails_leaves_no_checkpoint_and_the_next_one_works(attached, tmp_path):
    class Full(CheckpointCallback):
        """The disk is full, once."""

        done = False

        def on_checkpoint(self, trainer, handle, folder):
            assert (folder / ADAPTER_FILE).is_file()
            assert folder.parent.name.startswith(".")
            if not self.done:
                self.done = True
                raise WriteError("full")

    trainer = make_trainer(attached(), tmp_path, [Full()])
    with pytest.raises(WriteError, match="full"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []
    assert trainer._get_output_dir(None) == str(tmp_path)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.fixture
def checkpoint(attached, tmp_path):
    """A checkpoint of the tiny model, rank 4."""
    trainer = make_trainer(attached(), tmp_path / "run")
    trainer.train()
    return tmp_path / "run" / "checkpoint-4"


def refused(model, checkpoint, error, match):
    """Resuming raises, and nothing of the live adapter has changed."""
    trainer = make_trainer(model, checkpoint.parent)
    before = trainer.adapter.snapshot()
    with pytest.raises(error, match=match):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert equal(trainer.adapter.snapshot(), before)
    assert trainer.adapter.record.provenance == before.provenance


def test_another_base_is_refused(attached, checkpoint):
    model = attached()
    handle = tether.handles(model)["default"]
    handle.detach()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    tether.attach(model, tether.LoraConfig(rank=4))
    refused(model, checkpoint, BaseMismatchError, "layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"rank": 2}, ShapeMismatchError, "rank is 4 in the file, 2 here"),
        ({"target_modules": ["q_proj"]}, ShapeMismatchError, "only in the file"),
        ({"init": "milora"}, ConfigError, "method is 'pissa' in the file, 'milora' here"),
        ({"dropout": 0.1}, ShapeMismatchError, "dropout is 0.0 in the file, 0.1 here"),
        ({"alpha": 8}, ShapeMismatchError, "scaling is 1.0 in the file, 2.0 here"),
        ({"init": "lora"}, ShapeMismatchError, "anchored is True in the file, False here"),
        ({"use_dora": True}, ShapeMismatchError, "DoRA is False in the file, True here"),
        ({"seed": 1}, ConfigError, "seed is 0 in the file, 1 here"),
        ({"modules_to_save": ["norm"]}, ConfigError, "modules_to_save"),
    ],
)
def test_other_settings_are_refused(attached, checkpoint, settings, error, match):
    refused(attached(**settings), checkpoint, error, match)


def test_a_base_that_differs_where_a_module_is_trained_whole_is_refused(tiny_llama, tmp_path):
    config = tether.LoraConfig(rank=2, modules_to_save=["norm"])
    models = [tiny_llama(), tiny_llama()]
    with torch.no_grad():
        models[1].model.norm.weight[0] += 1
    for model in models:
        tether.attach(model, config)
    make_trainer(models[0], tmp_path).train()
    refused(models[1], tmp_path / "checkpoint-4", BaseMismatchError, r"model.norm.weight")


def test_a_damaged_file_is_refused(attached, checkpoint):
    path = checkpoint / ADAPTER_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(attached(), checkpoint, DigestError, "damaged")
    with pytest.raises(DigestError):
        last_adapter(checkpoint.parent)


@pytest.mark.parametrize("name", [ADAPTER_FILE, "trainer_state.json"])
def test_a_folder_that_is_no_checkpoint_is_refused(attached, checkpoint, name):
    (checkpoint / name).unlink()
    refused(attached(), checkpoint, NotAnAdapterError, f"has no {name}")


def test_an_offloaded_adapter_is_refused(attached, checkpoint):
    trainer = make_trainer(attached(), checkpoint.parent)
    trainer.adapter.offload("cpu")
    with pytest.raises(OffloadedError, match="restore"):
        trainer._load_from_checkpoint(str(checkpoint))


def test_the_last_adapter_of_nothing_is_none(tmp_path):
    assert last_adapter(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-x").mkdir()
    assert last_adapter(tmp_path) is None


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    import importlib
    import sys

    for name in [n for n in sys.modules if n.startswith("tether.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="trl"):
        importlib.import_module("tether.integrations.transformers")
