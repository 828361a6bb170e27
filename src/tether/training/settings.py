"""What a training run is: every number that decides its result."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from tether.config import LoraConfig
from tether.errors import ConfigError, UnknownNameError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Settings:
    """A training run.

    Attributes:
        model: folder or hub id; None for the default model.
        data: .txt or .jsonl file; None for Python's documentation.
        eval_data: held-out file; None to hold out a part of `data`.
        lora: what to adapt and how.
        steps: optimizer steps; None for `epochs` over the data.
        epochs: passes over the data where `steps` is None.
        learning_rate: at the top of the schedule.
        warmup: share of the steps in which the learning rate rises linearly.
        batch_size: sequences per forward pass.
        accumulation: forward passes per step.
        block: tokens per sequence.
        weight_decay: of AdamW; it pulls the displacement to zero, which is towards the pretrained
            weights.
        clip: largest norm of the gradient; 0 for no limit.
        dtype: of the base model, "float32" or "bfloat16"; the factors are float32.
        device: "auto", "cpu", "cuda", …
        seed: of the order of the data and of dropout.
        held_out: share of `data` held out.
        eval_limit: most sequences per evaluation.
        eval_every: steps between evaluations; 0 for only before and after.
        save_every: steps between checkpoints; 0 for only at the end.
        checkpointing: recompute activations in the backward pass, to save memory.
    """

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 2e-4
    warmup: float = 0.05
    batch_size: int = 4
    accumulation: int = 1
    block: int = 128
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    held_out: float = 0.1
    eval_limit: int = 32
    eval_every: int = 0
    save_every: int = 50
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check every value; raise ConfigError naming it."""
        self._check_types()
        for name in ("batch_size", "accumulation", "eval_limit"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("block", self.block >= 2, "at least 2")
        self._check("steps", self.steps is None or self.steps >= 1, "at least 1")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            self._check(name, math.isfinite(value) and value > 0, "positive")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            self._check(name, math.isfinite(value) and value >= 0, "0 or positive")
        for name in ("eval_every", "save_every", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or positive")
        self._check("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        self._check("held_out", 0 < self.held_out < 1, "between 0 and 1")
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")

    def _check_types(self) -> None:
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
        for item in dataclasses.fields(self):
            kind, _, optional = str(item.type).partition(" | ")
            value = getattr(self, item.name)
            if kind not in kinds or (optional and value is None):
                continue
            if not isinstance(value, kinds[kind]) or (kind != "bool" and isinstance(value, bool)):  # type: ignore[arg-type]
                raise ConfigError(f"{item.name} must be {kind}, not {value!r}.")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {wanted}, not {getattr(self, name)!r}.")

    def total_steps(self, sequences: int) -> int:
        """Optimizer steps of the whole run.

        Args:
            sequences: in the training data.

        Returns:
            at least 1.
        """
        if self.steps is not None:
            return self.steps
        per_step = self.batch_size * self.accumulation
        return max(1, math.ceil(self.epochs * sequences / per_step))

    def torch_device(self) -> torch.device:
        """The device to train on.

        Returns:
            `device`, or for "auto" CUDA where there is one.

        Raises:
            ConfigError: torch cannot use it.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.zeros((), device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
        return device

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` is the inverse.

        Returns:
            field -> value.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"lora": self.lora.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Rebuild settings from `to_dict`.

        Args:
            values: field -> value; missing fields take their defaults.

        Returns:
            the settings.

        Raises:
            UnknownNameError: a field that does not exist; the nearest are offered.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UnknownNameError(f"settings have no field {name!r}. {nearest(name, known)}")
        return cls(**values | {"lora": LoraConfig.from_dict(values.get("lora", {}))})
