"""Callbacks of a Trainer that `adapt` made: the plain LoRA beside each checkpoint, and drift."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.drift import measure_drift
from tether.errors import ConfigError
from tether.export import save_as_lora
from tether.handle import Handle
from tether.integrations.transformers.folders import LORA_FOLDER
from tether.integrations.transformers.model import trained_handle


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that also takes part while a checkpoint is built, before it is published.

    Attributes:
        trainer: that it works in, once training has begun.
    """

    trainer: Any = None

    def on_checkpoint(self, trainer: Any, handle: Handle, folder: Path) -> None:
        """Called by the processes that write, with the checkpoint still under its hidden name.

        Args:
            trainer: that saves.
            handle: of the adapter in training.
            folder: of the checkpoint; what is written into it is published with it.
        """


class ExportLora(CheckpointCallback):
    """Write the plain LoRA at every save and at the end; the live model stays as it is.

    It is in `checkpoint-N/lora`, published with its checkpoint in one rename, and in
    `output_dir/lora` when training has ended, after `load_best_model_at_end`.
    """

    def __init__(
        self,
        rank: int | None = None,
        tolerance: float | None = None,
        dtype: torch.dtype | None = None,
        at_end: bool = True,
    ) -> None:
        """Remember what to write, as of `tether.save_as_lora`.

        Args:
            rank: largest rank of any site; None for no limit.
            tolerance: largest relative error of any site's ΔW from reducing its rank.
            dtype: of the file; None for float32.
            at_end: whether to write `output_dir/lora` too.
        """
        self.rank, self.tolerance, self.dtype, self.at_end = rank, tolerance, dtype, at_end

    def on_checkpoint(self, trainer: Any, handle: Handle, folder: Path) -> None:
        """Write the LoRA into a checkpoint.

        Args:
            trainer: that saves.
            handle: of the adapter in training.
            folder: of the checkpoint.

        Raises:
            TetherError: as of `tether.save_as_lora`; the checkpoint is not published then.
        """
        self._write(handle, folder / LORA_FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the LoRA of the whole run.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: "model" among them.

        Raises:
            TetherError: as of `tether.save_as_lora`.
        """
        if self.at_end and args.should_save:
            self._write(trained_handle(kwargs["model"]), Path(args.output_dir) / LORA_FOLDER)

    def _write(self, handle: Handle, path: Path) -> None:
        save_as_lora(
            handle,
            path,
            rank=self.rank,
            tolerance=self.tolerance,
            dtype=self.dtype,
            after="keep",
        )


class ReportDrift(CheckpointCallback):
    """Log how far training has moved the weights: `tether/drift`, `tether/effective_rank`.

    Through `Trainer.log`, so that they reach whatever logger the Trainer has, and its history.
    See `measure_drift` for what they are. TRL's trainers average their own metrics over the steps
    between two logs; these windows stay as they are.
    """

    def __init__(self, every: int | None = None) -> None:
        """Remember when to log.

        Args:
            every: steps between two reports; None for one at each save.

        Raises:
            ConfigError: `every` is no number of steps.
        """
        if every is not None and (type(every) is not int or every < 1):
            raise ConfigError(f"every={every!r} must be a number of steps, 1 or more, or None.")
        self.every = every

    def on_checkpoint(self, trainer: Any, handle: Handle, folder: Path) -> None:
        """Log at a save.

        Args:
            trainer: that saves.
            handle: of the adapter in training.
            folder: of the checkpoint.
        """
        if self.every is None:
            self._report(trainer, handle)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log after every so many steps.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: "model" among them.
        """
        if self.every is not None and state.global_step % self.every == 0:
            self._report(self.trainer, trained_handle(kwargs["model"]))

    def _report(self, trainer: Any, handle: Handle) -> None:
        if trainer is None or not trainer.is_world_process_zero():
            return
        drift = measure_drift(handle)
        values = {"tether/effective_rank": drift.effective_rank}
        if drift.relative is not None:
            values["tether/drift"] = drift.relative
        # A log says that what was due is done, which the losses of this step may not be yet.
        due = trainer.control.should_log
        # The Trainer's own: TRL's would empty what it has gathered for its next log.
        Trainer.log(trainer, values)
        trainer.control.should_log = due
