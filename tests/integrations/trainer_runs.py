"""Short runs of an adapted Trainer on a tiny model, the same ones every time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tether
from tether.integrations.transformers import adapt

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "ranks.json")


def sequences(count: int = 16, vocabulary: int = 32) -> list[dict[str, Tensor]]:
    """Random sequences of eight tokens, to be predicted."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, vocabulary, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(out: Path, **settings: Any) -> dict[str, Any]:
    """Arguments of a run of four steps on the CPU, saved after two."""
    return {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings


class SecondIsBest(Trainer):
    """A Trainer whose evaluation likes what was trained for two steps, and nothing more."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The score, without looking."""
        return {"eval_score": float(self.state.global_step == 2)}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


def make_trainer(
    model: nn.Module,
    out: Path,
    callbacks: Any = (),
    trainer_class: type = Trainer,
    **settings: Any,
) -> Any:
    """An adapted Trainer for a model with an adapter."""
    return adapt(trainer_class)(
        model=model,
        args=TrainingArguments(**arguments(out, **settings)),
        train_dataset=sequences(),
        eval_dataset=sequences(4),
        callbacks=list(callbacks),
    )


def losses(trainer: Any) -> list[float]:
    """The loss of every step, also of the steps before a resume."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tensors(adapter: tether.Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter."""
    for path, layer in adapter.layers.items():
        pairs = {"trained": layer.trainable, "anchor": layer.anchor}
        for name, factors in pairs.items():
            if factors is not None:
                yield f"{path}.{name}.A", factors.A
                yield f"{path}.{name}.B", factors.B
        if layer.magnitude is not None:
            yield f"{path}.magnitude", layer.magnitude.trainable
    yield from ((name, value.trainable) for name, value in adapter.trained_whole)


def equal(one: tether.Adapter, other: tether.Adapter) -> bool:
    """Whether every bit agrees."""
    mine, theirs = dict(tensors(one)), dict(tensors(other))
    return list(mine) == list(theirs) and all(torch.equal(t, theirs[n]) for n, t in mine.items())
