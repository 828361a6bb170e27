"""A whole training run: from settings to the files in one folder, resumable at any step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tether import formats, fs
from tether.attach import attach
from tether.drift import measure_drift
from tether.errors import ConfigError, DistributedError
from tether.export import save_as_lora
from tether.formats import peft_names
from tether.handle import Handle
from tether.ranks import launched
from tether.start import init
from tether.switch import reference
from tether.training import checkpoint, log, loop
from tether.training.data import Sequences
from tether.training.evaluate import Evaluation, evaluate
from tether.training.inputs import load_all
from tether.training.report import Reporter
from tether.training.resuming import PATHS, absolute, changed, check_adapter, check_same
from tether.training.settings import Settings

ADAPTER, CHECKPOINT, LORA = "adapter.safetensors", "checkpoint.safetensors", "lora"
METRICS, RUN = log.METRICS, log.RUN


@dataclass(slots=True)
class Run:
    """A run in progress: everything that is loaded.

    Attributes:
        settings: of the run.
        out: folder of its files.
        model: with the adapter attached.
        tokenizer: of the model.
        handle: of the adapter.
        optimizer: over its factors.
        data: for training.
        held_out: for evaluation.
        step: steps done.
        stopped: whether the user asked to stop.
        losses: held-out losses so far, by name.
        reporter: shows progress.
    """

    settings: Settings
    out: Path
    model: nn.Module
    tokenizer: Any
    handle: Handle
    optimizer: torch.optim.AdamW
    data: Sequences
    held_out: Sequences
    step: int = 0
    stopped: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    reporter: Reporter = field(default_factory=Reporter)

    def evaluate(self) -> Evaluation:
        """Held-out loss of the model as it is now.

        Returns:
            the loss; nothing changes.
        """
        size, limit = self.settings.batch_size, self.settings.eval_limit
        with self.reporter.task("Evaluating") as task:
            return evaluate(self.model, self.held_out, size, limit, task)

    def save(self) -> None:
        """Write the adapter and what is needed to go on. Changes nothing in the model."""
        self.handle.annotate(learning_rate=self.settings.learning_rate, steps=self.step)
        # The adapter first: a checkpoint needs its anchor, and the anchor never changes.
        self.handle.save(self.out / ADAPTER)
        checkpoint.save(self.out / CHECKPOINT, self.handle, self.optimizer, self.step)

    def describe(self, status: str) -> None:
        """Write run.json.

        Args:
            status: "running", "interrupted" or "finished".
        """
        names = ("tether", "torch", "transformers")
        total = self.settings.total_steps(len(self.data))
        record = {
            "status": status,
            "steps_done": self.step,
            "steps": total,
            "held_out_loss": self.losses,
            "device": str(next(self.model.parameters()).device),
            "versions": {name: version(name) for name in names},
            "data_sha256": self.data.digest(),
            "held_out_sha256": self.held_out.digest(),
            "sequences": {"train": len(self.data), "held_out": len(self.held_out)},
            "settings": self.settings.to_dict(),
        }
        log.write_record(self.out, record)


def prepare(
    settings: Settings, out: Path, *, overwrite: bool, reporter: Reporter, cache: bool = True
) -> Run:
    """Load everything for a new run and write its start.

    Args:
        settings: of the run.
        out: folder of its files.
        overwrite: whether a run that is there may be replaced.
        reporter: shows progress.
        cache: whether anchors are looked for and kept in the user's cache.

    Returns:
        a run at step 0.

    Raises:
        ConfigError: `out` holds a run, and `overwrite` is False.
        DistributedError: a launcher started several processes.
        TetherError: model, data or configuration cannot be used.
    """
    _check_alone()
    if (out / RUN).exists() and not overwrite:
        raise ConfigError(
            f"{out}: holds a run already. Go on with it (--resume), choose another --out, or "
            "replace it (--overwrite)."
        )
    fs.check_replaceable(out / LORA, peft_names.FILES)
    settings = replace(settings, **absolute({n: getattr(settings, n) for n in PATHS}))
    model, tokenizer, data, held_out = load_all(settings, reporter)
    with reporter.task("Finding the anchors") as task:
        adapter = init(model, settings.lora, cache=cache, progress=task)
    torch.manual_seed(settings.seed)
    # Just made from this very model: nothing to verify.
    handle = attach(model, adapter, verify=False)
    optimizer = loop.make_optimizer(handle, settings)
    run = Run(settings, out, model, tokenizer, handle, optimizer, data, held_out, reporter=reporter)
    with reference(model):
        run.losses["base"] = run.evaluate().loss
    with fs.new_directory(out):
        # First the record: without one, what a replacement leaves half done is no run.
        fs.remove(out / RUN)
        fs.write_text(out / METRICS, "")
        run.save()
        run.describe("running")
    return run


def resume(out: Path, changes: dict[str, Any], reporter: Reporter, *, verify: bool = True) -> Run:
    """Load everything for a run that was begun, at the step of its last checkpoint.

    Args:
        out: folder of its files.
        changes: settings given anew; only those that do not rewrite the past may differ.
        reporter: shows progress.
        verify: check that the base is the one the run began on.

    Returns:
        a run that goes on as if it had not been interrupted, bit for bit.

    Raises:
        ConfigError: there is no run, or a setting differs, also that of the adapter's file.
        DataError: the training text is not the same any more.
        BaseMismatchError: the base is another one.
        FormatError: a file is damaged, or of another run. After any error no file has changed.
        DistributedError: a launcher started several processes.
    """
    _check_alone()
    record = log.read_record(out)
    before = log.settings_of(out, record)
    settings = changed(before, absolute(changes))
    model, tokenizer, data, held_out = load_all(settings, reporter)
    check_same(data, record["data_sha256"], settings.data)
    check_same(held_out, record["held_out_sha256"], settings.eval_data or settings.data)
    adapter = formats.load(out / ADAPTER)
    check_adapter(out / ADAPTER, adapter, settings.lora)
    with reporter.task("Checking the base"):
        handle = attach(model, adapter, verify=verify)
    optimizer = loop.make_optimizer(handle, settings)
    step = checkpoint.load(out / CHECKPOINT, handle, optimizer)
    log.cut_metrics(out, step)
    run = Run(settings, out, model, tokenizer, handle, optimizer, data, held_out, step)
    run = replace(run, losses=dict(record["held_out_loss"]), reporter=reporter)
    if settings.eval_limit != before.eval_limit:
        with reference(model):
            run.losses["base"] = run.evaluate().loss
    return run


def execute(run: Run, stop: Callable[[], bool] = lambda: False) -> None:
    """Train to the end, or until `stop`, and write the files.

    Args:
        run: as of `prepare` or `resume`.
        stop: asked after every step.

    Raises:
        NonFiniteError: training diverged; the last checkpoint stays.
        WriteError: a file cannot be written.
    """
    fs.make_directory(run.out)
    total = run.settings.total_steps(len(run.data))
    began, first = time.monotonic(), run.step
    if first < total:
        run.losses.pop("adapter", None)
    if first and _due(run.settings.save_every, first, total):
        _log_drift(run)
    if first and _due(run.settings.eval_every, first, total):
        _evaluate_once(run)
    with run.reporter.task("Training") as task:

        def on_step(step: loop.Step) -> bool:
            run.step = step.number
            seconds = (time.monotonic() - began) / (step.number - first)
            log.append_step(run.out, step, seconds)
            task.note(f"loss {step.loss:.4f}")
            task(step.number, total)
            run.stopped = stop()
            if _due(run.settings.save_every, step.number, total) and not run.stopped:
                # First the log: a run is gone on with from a checkpoint whose drift it has.
                _log_drift(run)
                run.save()
            if _due(run.settings.eval_every, step.number, total) and not run.stopped:
                _evaluate_once(run)
            return run.stopped

        task(first, total)
        loop.train(
            run.model,
            run.handle,
            run.optimizer,
            run.data,
            run.settings,
            first=first,
            on_step=on_step,
        )
    run.model.eval()
    run.save()
    if not run.stopped:
        run.losses["adapter"] = _evaluate_once(run)
    # Last: it may take the adapter off the model (LoraConfig.after_save).
    with run.reporter.task("Writing the plain LoRA"):
        save_as_lora(run.handle, run.out / LORA)
    run.describe("interrupted" if run.stopped else "finished")


def _due(every: int, number: int, total: int) -> bool:
    return every > 0 and number % every == 0 and number < total


def _log_drift(run: Run) -> None:
    log.append_drift(run.out, run.step, measure_drift(run.handle))


def _evaluate_once(run: Run) -> float:
    """Evaluate now, and log it unless the log has it: a run may be resumed at any point."""
    loss = run.evaluate().loss
    log.append_evaluation(run.out, run.step, loss)
    return loss


def _check_alone() -> None:
    """Every process of a launcher would train the same, and write to the same folder."""
    if (size := launched()) > 1:
        raise DistributedError(
            f"tether train runs in one process, and a launcher started {size}. Start it without "
            "torchrun or accelerate launch. For several processes use adapt(Trainer) of "
            "tether.integrations.transformers, or a loop as in docs/guides/several-processes.md."
        )
