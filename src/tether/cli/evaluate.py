"""`tether eval`: held-out loss and accuracy of a model, alone and with each of several adapters."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from tether import formats
from tether.attach import attach
from tether.cli import scores
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    print_json,
    use_all_cores,
)
from tether.errors import ConfigError
from tether.switch import activate
from tether.training import classify, inputs, labels
from tether.training.evaluate import evaluate_all
from tether.training.settings import Settings
from tether.value import Adapter

NAME = "eval"
DEFAULT = "default"  # the word for the default model, where adapters follow


def command(
    model: Annotated[
        str | None,
        typer.Argument(help=f"Folder or hub id; {DEFAULT}, or nothing, for SmolLM2-135M."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER", help="Native files and PEFT folders. Default: the base alone."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="As for `train`: its held-out part; or a labelled file, whole: .csv or .jsonl "
            "with text and label. Default: Python's documentation."
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="A file to use whole instead.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of --data held out.")] = 0.1,
    block: Annotated[int, typer.Option(help="Tokens per sequence of running text.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    limit: Annotated[
        int, typer.Option("--limit", "--eval-limit", help="Most sequences, or labelled rows.")
    ] = 32,
    template: Annotated[
        str | None,
        typer.Option(
            help="What is read of a labelled row; \\n is a new line. Default: "
            + classify.TEMPLATE.replace("\n", "\\n")
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    verify: Annotated[
        bool, typer.Option(help="Check that the base is the one each adapter was made on.")
    ] = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the held-out loss, and accuracy where there are labels, of the base and each adapter.

    The base is loaded once, and every batch goes through it once for itself and once for each
    adapter. Differences are paired, with a 95 % bootstrap interval. Writes nothing.
    """
    with guarded(json_, debug):
        use_all_cores()
        if limit < 1:
            raise ConfigError(f"--limit must be at least 1, not {limit}.")
        bars = Bars(quiet=json_)
        settings = Settings(
            model=None if model == DEFAULT else model,
            data=data,
            eval_data=eval_data,
            held_out=held_out,
            block=block,
            batch_size=batch_size,
            eval_limit=limit,
            dtype=dtype,
            device=device,
        )
        _check_base(settings.model)
        paths = _distinct(adapters or [])
        template = classify.TEMPLATE if template is None else template.replace("\\n", "\n")
        rows = _labelled(eval_data or data, template)
        values = {path: formats.load(path) for path in paths}
        base, tokenizer = inputs.load_base(settings, bars)
        names = _attach(base, values, verify, bars)
        found = _measure(base, names, settings, tokenizer, rows, template, bars)
        if json_:
            print_json(found)
        else:
            scores.show(found)


def _check_base(model: str | None) -> None:
    """Raise where an adapter is given in the place of the base."""
    path = Path(model or "")
    if path.is_file() or (
        (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
    ):
        raise ConfigError(
            f"{model}: is in the place of the base model, and is "
            f"{'a file' if path.is_file() else 'an adapter'}. Give the base first: `tether eval "
            f"MODEL {model}`, or `tether eval {DEFAULT} {model}` for the default model."
        )


def _distinct(paths: list[str]) -> list[str]:
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"adapter {path} is given {paths.count(path)} times. Give it once.")
    return paths


def _labelled(path: str | None, template: str) -> labels.Labelled | None:
    """The rows of a labelled file; None for running text."""
    classify.split_template(template)
    if path is not None and labels.is_labelled(path):
        return labels.load(path)
    if template != classify.TEMPLATE:
        raise ConfigError("--template is for labelled files; leave it out for running text.")
    return None


def _attach(
    base: nn.Module, values: dict[str, Adapter], verify: bool, bars: Bars
) -> dict[str, str]:
    """Path -> name on the model, which an error shows; none of them takes part yet."""
    names = {}
    with bars.task("Attaching") as task:
        for number, (path, value) in enumerate(values.items(), start=1):
            # With a number and "-" it is no attribute of a module, and no other path's.
            name = f"{number}-" + re.sub(r"[^A-Za-z0-9_-]+", "_", path)[-100:]
            attach(base, value, name, trainable=False, verify=verify)
            activate(base)
            names[path] = name
            task(number, len(values))
    return names


def _measure(
    base: nn.Module,
    names: dict[str, str],
    settings: Settings,
    tokenizer: Any,
    rows: labels.Labelled | None,
    template: str,
    bars: Bars,
) -> dict[str, Any]:
    """JSON values of everything."""
    keys = list(names.values())
    if rows is None:
        sequences = inputs.load_held_out(settings, tokenizer)
        with bars.task("Evaluating") as task:
            losses = evaluate_all(
                base, keys, sequences, settings.batch_size, settings.eval_limit, task
            )
        covered = scores.coverage(len(losses.counts), len(sequences))
        return covered | scores.facts(names, losses)
    with bars.task("Evaluating") as task:
        answers = classify.evaluate_labels(
            base,
            keys,
            rows,
            tokenizer,
            template=template,
            batch_size=settings.batch_size,
            limit=settings.eval_limit,
            progress=task,
        )
    covered = scores.coverage(len(answers.rows), len(rows), answers.rows)
    return covered | scores.facts(names, answers.losses, answers.correct)
