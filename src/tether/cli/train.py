"""`tether train`: fine-tune a model, from text to adapter and plain LoRA."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.table import Table

from tether import fs
from tether.cli.console import (
    Bars,
    CacheOption,
    DebugOption,
    JsonOption,
    err,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.cli.lora import (
    FIELDS,
    AlphaOption,
    AlphaPatternOption,
    DoraOption,
    ExcludeOption,
    InitOption,
    LayersOption,
    RankOption,
    RankPatternOption,
    RsloraOption,
    TargetOption,
    lora_fields,
)
from tether.config import LoraConfig
from tether.errors import TetherError
from tether.report import read
from tether.report import run as pages
from tether.training import run as runs
from tether.training.run import Run
from tether.training.settings import Settings

NAME = "train"
# Steps of a run that names neither data nor length: a first look in a few minutes.
_FIRST_LOOK = 40
_WRITTEN = (runs.ADAPTER, runs.LORA, runs.CHECKPOINT, runs.METRICS, runs.RUN)
_NOT_SETTINGS = {"out_dir", "verify", "resume", "overwrite", "cache", "json_", "debug"}
_NOT_SETTINGS |= set(FIELDS)


def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id. Default: SmolLM2-135M from its wheel."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=".txt, or .jsonl with text, prompt/completion or messages. "
            "Default: Python's own documentation."
        ),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "tether-out"
    ),
    init: InitOption = "pissa",
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    rslora: RsloraOption = False,
    dropout: Annotated[float, typer.Option(help="Dropout of the adapter's input.")] = 0.0,
    target: TargetOption = None,
    exclude: ExcludeOption = None,
    layers: LayersOption = None,
    rank_pattern: RankPatternOption = None,
    alpha_pattern: AlphaPatternOption = None,
    dora: DoraOption = False,
    bias: Annotated[str, typer.Option(help="Biases to train: none, lora_only, all.")] = "none",
    save_module: Annotated[
        list[str] | None, typer.Option(help="Module to train whole; repeatable.")
    ] = None,
    after: Annotated[
        str,
        typer.Option(help="The live adapter once lora/ is written: keep, offload, detach."),
    ] = "keep",
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Optimizer steps. Default: --epochs over the data; {_FIRST_LOOK} without --data."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At the top of the cosine.")
    ] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Share of steps with a rising rate.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    block: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    weight_decay: Annotated[
        float, typer.Option(help="Pulls towards the pretrained weights.")
    ] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: no limit.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the base: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the start, the data's order and dropout.")] = 0,
    eval_data: Annotated[str | None, typer.Option(help="Held-out file.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the data held out.")] = 0.1,
    eval_limit: Annotated[int, typer.Option(help="Most sequences per evaluation.")] = 32,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: none.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="With --resume: check that the base is the same.")
    ] = True,
    cache: CacheOption = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a language model with an anchored adapter. The base is never written.

    Writes to --out: adapter.safetensors (exact, trainable), lora/ (plain LoRA for peft and other
    software), checkpoint.safetensors, metrics.jsonl, run.json and report.html. Ctrl-C finishes the
    step and writes all of them; --resume goes on from there.
    """
    with guarded(json_, debug):
        use_all_cores()
        bars = Bars(quiet=json_)
        if resume:
            run = runs.resume(out_dir, _given(context), bars, verify=verify)
        else:
            values = {k: v for k, v in context.params.items() if k not in _NOT_SETTINGS}
            if data is None and steps is None and "epochs" not in _given(context):
                values["steps"] = _FIRST_LOOK
            settings = Settings(**values, lora=LoraConfig(**lora_fields(context.params), seed=seed))
            run = runs.prepare(settings, out_dir, overwrite=overwrite, reporter=bars, cache=cache)
        first = run.step
        fs.remove(run.out / read.PAGE)  # of an older state
        with _interruptible() as stop:
            runs.execute(run, stop)
        missing = _write_page(run)
        written = [str(run.out / name) for name in _WRITTEN]
        written += [] if missing else [str(run.out / read.PAGE)]
        if json_:
            print_json(_summary(run, written))
        else:
            _print(run, first, written)
        if missing:
            err.print(f"no page of the run: {missing}", soft_wrap=True)
        if run.stopped:
            raise typer.Exit(130)


def _given(context: typer.Context) -> dict[str, Any]:
    """The settings that were typed, as opposed to defaults."""
    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    result = {name: value for name, value in given.items() if name not in _NOT_SETTINGS}
    return result | {f"lora.{field}": value for field, value in lora_fields(given).items()}


@dataclass(slots=True)
class _Flag:
    """Whether the user asked to stop."""

    raised: bool = False

    def __call__(self) -> bool:
        return self.raised


@contextmanager
def _interruptible() -> Iterator[_Flag]:
    """The first Ctrl-C (or SIGTERM) asks to stop after the step; the second stops at once."""
    flag = _Flag()

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        if flag.raised:
            raise KeyboardInterrupt
        flag.raised = True
        err.print("stopping after this step; the run is saved and can be resumed")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_page(run: Run) -> TetherError | None:
    """Write report.html; what stands in the way, if anything: the run itself is complete."""
    try:
        pages.write(run.out, reporter=run.reporter)
    except TetherError as error:
        return error
    return None


def _summary(run: Run, written: list[str]) -> dict[str, Any]:
    return {
        "status": "interrupted" if run.stopped else "finished",
        "steps_done": run.step,
        "steps": run.settings.total_steps(len(run.data)),
        "held_out_loss": run.losses,
        "sequences": {"train": len(run.data), "held_out": len(run.held_out)},
        "left_out": run.data.left_out,
        "sites": len(run.handle.sites),
        "written": written,
    }


def _print(run: Run, first: int, written: list[str]) -> None:
    table = Table("", "held-out loss", title=f"{run.settings.lora.method.name}, {run.step} steps")
    for name, loss in run.losses.items():
        table.add_row(name, f"{loss:.4f}")
    if not run.stopped:
        out.print(table)
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True)
    if run.stopped:
        out.print(
            f"stopped after step {run.step} (began at {first}); go on with: "
            f"tether train --resume --out {run.out}"
        )
