"""The mixin that makes any Trainer train an adapter of tether's: what is saved, loaded, compared.

It overrides as little as it can, and calls `super()` wherever the Trainer has work of its own:

- `_save` and `_load_from_checkpoint`, `_load_best_model`: what stands for the model in a folder.
  They are the Trainer's own seams between "when" and "what"; peft's branches are inside them.
- `_get_output_dir`, around `_save_checkpoint`: while a checkpoint is written the run's folder is a
  hidden one, so all that the Trainer and its subclasses write, now or in a later version, lands
  there, and one rename publishes it. No file is named here but the trainer's state, which is
  written once more with the published path of the best checkpoint.
- `_finalize_training` and `_push_from_checkpoint`: only the order of removing, renaming, pushing.
- `__init__` and `train`: checks before, and the argument `ref_model` where a subclass has it.

No function of transformers or TRL is replaced. Where a version has no such seam, the Trainer is
refused when it is made, rather than saving the base.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from tether import fs
from tether.errors import NotAnAdapterError
from tether.handle import Handle
from tether.integrations.transformers import checks, folders
from tether.integrations.transformers.arguments import Arguments
from tether.integrations.transformers.callbacks import CheckpointCallback
from tether.integrations.transformers.folders import ADAPTER_FILE, UNFINISHED
from tether.integrations.transformers.model import check_model, trained_handle
from tether.integrations.transformers.quantized import allow_quantized
from tether.integrations.transformers.reference import Reference, own_reference
from tether.integrations.transformers.restore import put_in_place


class AdapterTrainer:
    """To be the first base of a class whose others are a Trainer: `adapt` does that.

    The model must have one trainable adapter, and nothing else that is trained. Checkpoints hold
    `adapter.safetensors` (see `tether.formats.native`), the tokenizer and the Trainer's own files,
    never the base. `save_model` writes the adapter and the tokenizer.
    """

    _unfinished = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check the model, give preference training its reference, and make the Trainer.

        Args:
            *args: of the Trainer.
            **kwargs: of the Trainer. Where it takes a `ref_model` and none is given, it is the
                live model without its adapters.

        Raises:
            ConfigError: the model has no trainable adapter, or several, or is trained besides; a
                setting that excludes an adapter; a sharded model.
        """
        given = Arguments(type(self), super().__init__, args, kwargs)
        checks.check_arguments(given)
        model = given.get("model")
        with ExitStack() as stack:
            if isinstance(model, nn.Module):
                check_model(model)
                stack.enter_context(allow_quantized(model))
                beta = stack.enter_context(own_reference(given, model))
            else:
                beta = 0.0
            super().__init__(*given.args, **given.kwargs)
        me: Any = self
        check_model(me.model)
        if beta:
            me.beta, me.ref_model = beta, Reference(me.model)
        checks.check_trainer(me)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as of `Trainer.train`.

        Args:
            *args: of `Trainer.train`.
            **kwargs: of `Trainer.train`.

        Returns:
            what `Trainer.train` does.
        """
        me: Any = self
        for callback in me.callback_handler.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.trainer = self
        return super().train(*args, **kwargs)  # type: ignore[misc]

    @property
    def adapter(self) -> Handle:
        """The adapter in training."""
        me: Any = self
        return trained_handle(me.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter and the tokenizer; what would be the base's weights is not used."""
        me: Any = self
        if not me.args.should_save:
            return
        folder = Path(me.args.output_dir if output_dir is None else output_dir)
        fs.make_directory(folder)
        self.adapter.annotate(
            learning_rate=float(me.args.learning_rate), steps=int(me.state.global_step)
        )
        self.adapter.save(folder / ADAPTER_FILE)
        tokenizer = me.processing_class
        if tokenizer is None:
            tokenizer = getattr(me.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter of a checkpoint, in place of the live values."""
        folder = Path(resume_from_checkpoint)
        for name in (ADAPTER_FILE, TRAINER_STATE_NAME):
            if not (folder / name).is_file():
                raise NotAnAdapterError(
                    f"{folder}: has no {name}, so it is no checkpoint of an adapter in training. "
                    "Give a folder 'checkpoint-N' that such a run wrote."
                )
        me: Any = self
        folders.check_ranks(folder, me.args.world_size)
        put_in_place(self.adapter, folder / ADAPTER_FILE)

    def _load_best_model(self) -> None:
        me: Any = self
        put_in_place(self.adapter, Path(me.state.best_model_checkpoint) / ADAPTER_FILE)

    def _get_output_dir(self, trial: Any = None) -> str:
        """The run's folder; while a checkpoint is built, the hidden one in it."""
        run: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(run) / UNFINISHED) if self._unfinished else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Built under a hidden name by every process, then published by the ones that write."""
        me: Any = self
        run, name = Path(self._get_output_dir(trial)), folders.checkpoint_name(me.state.global_step)
        if me.args.local_process_index == 0:
            folders.clear(run)
        me.accelerator.wait_for_everyone()
        best = me.state.best_model_checkpoint
        with self._build_aside():
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                best = _best(me.state, run, name, best)
                if me.args.should_save:
                    self._complete(run / UNFINISHED / name, best)
            except BaseException:
                folders.clear(run)
                raise
            finally:
                me.state.best_model_checkpoint = best
        me.accelerator.wait_for_everyone()
        if me.args.should_save:
            folders.publish(run, name)
            folders.rotate(run, me.args.save_total_limit, best)
        if me.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    @contextmanager
    def _build_aside(self) -> Iterator[None]:
        self._unfinished = True
        try:
            yield
        finally:
            self._unfinished = False

    def _complete(self, folder: Path, best: str | None) -> None:
        """What belongs into a checkpoint besides; its state names published folders only."""
        me: Any = self
        for callback in me.callback_handler.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.on_checkpoint(self, self.adapter, folder)
        me.state.best_model_checkpoint = best
        me.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        folders.write_ranks(folder, me.args.world_size)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """After it is published, and with the adapter where the Trainer puts a model."""
        if self._unfinished:
            return
        me: Any = self
        if me.is_world_process_zero():
            with fs.atomic_file(Path(me.args.output_dir) / ADAPTER_FILE) as temporary:
                fs.copy_file(Path(checkpoint_folder) / ADAPTER_FILE, temporary)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        """With a limit of one only the best checkpoint stays; each goes in one rename."""
        me: Any = self
        best = me.state.best_model_checkpoint
        if me.args.should_save and best is not None and me.args.save_total_limit == 1:
            folders.keep_only(Path(self._get_output_dir(trial)), {Path(best).resolve()})
        return super()._finalize_training(trial, *args)  # type: ignore[misc]


def _best(state: Any, run: Path, name: str, before: str | None) -> str | None:
    """The published path of the best checkpoint, which may be the one that is being built."""
    if not state.best_global_step:
        return before
    best = folders.checkpoint_name(state.best_global_step)
    return str(run / best) if best == name or (run / best).is_dir() else before
