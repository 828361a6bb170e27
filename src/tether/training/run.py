"""A whole training run: from settings to the files in one folder, resumable at any step."""

import json
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
from tether.errors import ConfigError, DataError, HeaderError
from tether.export import save_as_lora
from tether.formats import container
from tether.handle import Handle
from tether.integrations import hub, smollm2
from tether.start import init
from tether.switch import reference
from tether.training import checkpoint, loop
from tether.training.data import Sequences, load, split
from tether.training.evaluate import Evaluation, evaluate
from tether.training.report import Reporter
from tether.training.settings import DTYPES, Settings

ADAPTER, CHECKPOINT, LORA = "adapter.safetensors", "checkpoint.safetensors", "lora"
METRICS, RUN = "metrics.jsonl", "run.json"


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
            "sequences": {"train": len(self.data), "held_out": len(self.held_out)},
            "settings": self.settings.to_dict(),
        }
        fs.write_text(self.out / RUN, json.dumps(record, indent=2) + "\n")


def prepare(settings: Settings, out: Path, *, overwrite: bool, reporter: Reporter) -> Run:
    """Load everything for a new run and write its start.

    Args:
        settings: of the run.
        out: folder of its files.
        overwrite: whether a run that is there may be replaced.
        reporter: shows progress.

    Returns:
        a run at step 0.

    Raises:
        ConfigError: `out` holds a run, and `overwrite` is False.
        TetherError: model, data or configuration cannot be used.
    """
    if (out / RUN).exists() and not overwrite:
        raise ConfigError(
            f"{out}: holds a run already. Go on with it (--resume), choose another --out, or "
            "replace it (--overwrite)."
        )
    model, tokenizer, data, held_out = _load(settings, reporter)
    with reporter.task("Finding the anchors") as task:
        adapter = init(model, settings.lora, progress=task)
    torch.manual_seed(settings.seed)
    # Just made from this very model: nothing to verify.
    handle = attach(model, adapter, verify=False)
    optimizer = loop.make_optimizer(handle, settings)
    run = Run(settings, out, model, tokenizer, handle, optimizer, data, held_out, reporter=reporter)
    with reference(model):
        run.losses["base"] = run.evaluate().loss
    fs.make_directory(out)
    fs.write_text(out / METRICS, "")
    run.save()
    run.describe("running")
    return run


def resume(out: Path, changes: dict[str, Any], reporter: Reporter) -> Run:
    """Load everything for a run that was begun, at the step of its last checkpoint.

    Args:
        out: folder of its files.
        changes: settings given anew; only those that do not rewrite the past may differ.
        reporter: shows progress.

    Returns:
        a run that goes on as if it had not been interrupted, bit for bit.

    Raises:
        ConfigError: there is no run, or a setting differs.
        DataError: the training text is not the same any more.
        FormatError: a file is damaged.
    """
    record = _read_record(out)
    settings = _changed(Settings.from_dict(record["settings"]), changes)
    model, tokenizer, data, held_out = _load(settings, reporter)
    if data.digest() != record["data_sha256"]:
        raise DataError(
            f"{settings.data or 'the training text'}: is not what the run began with. Restore it, "
            "or begin a new run in another --out."
        )
    with reporter.task("Checking the base"):
        handle = attach(model, formats.load(out / ADAPTER))
    optimizer = loop.make_optimizer(handle, settings)
    step = checkpoint.load(out / CHECKPOINT, handle, optimizer)
    losses = {str(k): float(v) for k, v in record["held_out_loss"].items()}
    _cut_metrics(out / METRICS, step)
    run = Run(settings, out, model, tokenizer, handle, optimizer, data, held_out, step)
    return replace(run, losses=losses, reporter=reporter)


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
    with run.reporter.task("Training") as task:

        def on_step(step: loop.Step) -> bool:
            run.step = step.number
            seconds = (time.monotonic() - began) / (step.number - first)
            _log(run, step, seconds)
            task.note(f"loss {step.loss:.4f}")
            task(step.number, total)
            run.stopped = stop()
            if _due(run.settings.save_every, step.number, total) and not run.stopped:
                run.save()
            if _due(run.settings.eval_every, step.number, total) and not run.stopped:
                _log_evaluation(run, run.evaluate())
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
    with run.reporter.task("Writing the plain LoRA"):
        save_as_lora(run.handle, run.out / LORA)
    if not run.stopped:
        final = run.evaluate()
        run.losses["adapter"] = final.loss
        _log_evaluation(run, final)
    run.describe("interrupted" if run.stopped else "finished")


def load_base(settings: Settings, reporter: Reporter) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer.

    Args:
        settings: model, dtype and device are used.
        reporter: shows progress.

    Returns:
        model in eval mode on its device, tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    device = settings.torch_device()
    name = settings.model
    if name is None:
        with reporter.task("Preparing the default model (once)"):
            name = str(smollm2.folder())
    with reporter.task("Loading the model"):
        tokenizer = hub.load_tokenizer(name)
        model = hub.load_model(name, DTYPES[settings.dtype], str(device))
    if settings.checkpointing:
        hub.enable_checkpointing(model)
    return model, tokenizer


def load_held_out(settings: Settings, tokenizer: Any) -> Sequences:
    """Only the held-out sequences.

    Args:
        settings: eval_data used whole, or the held-out part of data.
        tokenizer: of the model.

    Returns:
        for evaluation.

    Raises:
        DataError: the text cannot be used.
    """
    if settings.eval_data is not None:
        return load(settings.eval_data, tokenizer, settings.block)
    return load_data(settings, tokenizer)[1]


def load_data(settings: Settings, tokenizer: Any) -> tuple[Sequences, Sequences]:
    """The training and the held-out sequences.

    Args:
        settings: data, eval_data, held_out and block are used.
        tokenizer: of the model.

    Returns:
        for training, for evaluation.

    Raises:
        DataError: the text cannot be used.
    """
    data = load(settings.data, tokenizer, settings.block)
    if settings.eval_data is None:
        return split(data, settings.held_out)
    return data, load(settings.eval_data, tokenizer, settings.block)


def _load(settings: Settings, reporter: Reporter) -> tuple[nn.Module, Any, Sequences, Sequences]:
    model, tokenizer = load_base(settings, reporter)
    with reporter.task("Reading the text"):
        data, held_out = load_data(settings, tokenizer)
    return model, tokenizer, data, held_out


def _read_record(out: Path) -> dict[str, Any]:
    path = out / RUN
    if not path.exists():
        raise ConfigError(f"{out}: there is no run to go on with ({RUN} is missing).")
    record = container.parse_json(path.read_text(encoding="utf-8"), str(path))
    wanted = {"settings": dict, "held_out_loss": dict, "data_sha256": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in wanted.items()
    ):
        raise HeaderError(f"{path}: not the record of a run; it needs {', '.join(wanted)}.")
    return record


# What may differ when a run goes on; everything else would rewrite its past.
_FREE = ("steps", "epochs", "save_every", "eval_every", "eval_limit", "device")


def _changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    for name, value in changes.items():
        owner: Any = settings.lora if name.startswith("lora.") else settings
        before = getattr(owner, name.removeprefix("lora."))
        value = tuple(value) if isinstance(before, tuple) else value
        if name not in _FREE and value != before:
            raise ConfigError(
                f"{name}: the run began with {before!r}; {value!r} would make it another run. "
                "Leave it out, or begin a new run in another --out."
            )
    return replace(settings, **{name: changes[name] for name in changes if name in _FREE})


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps are run again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    fs.write_text(path, "".join(line + "\n" for line in kept))


def _due(every: int, number: int, total: int) -> bool:
    return every > 0 and number % every == 0 and number < total


def _log(run: Run, step: loop.Step, seconds: float) -> None:
    record = {
        "step": step.number,
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "tokens": step.tokens,
        "seconds_per_step": round(seconds, 4),
    }
    fs.append_line(run.out / METRICS, json.dumps(record))


def _log_evaluation(run: Run, evaluation: Evaluation) -> None:
    record = {"step": run.step, "held_out_loss": evaluation.loss}
    fs.append_line(run.out / METRICS, json.dumps(record))
