"""`tether eval`: held-out loss of a model, alone or with an adapter from disk."""

from typing import Annotated

import typer
from rich.table import Table

from tether import formats
from tether.attach import attach
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.switch import reference
from tether.training import inputs
from tether.training.evaluate import Evaluation, evaluate
from tether.training.settings import Settings

NAME = "eval"


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id. Default: SmolLM2-135M from its wheel."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Native file or PEFT folder. Default: the base alone.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="As for `train`: its held-out part. Default: Python's documentation."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="A file to use whole instead.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of --data held out.")] = 0.1,
    block: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    eval_limit: Annotated[int, typer.Option(help="Most sequences.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of the base: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    verify: Annotated[
        bool, typer.Option(help="Check that the base is the one the adapter was made on.")
    ] = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the held-out loss of the base, and of base and adapter. Writes nothing."""
    with guarded(json_, debug):
        use_all_cores()
        bars = Bars(quiet=json_)
        settings = Settings(
            model=model,
            data=data,
            eval_data=eval_data,
            held_out=held_out,
            block=block,
            batch_size=batch_size,
            eval_limit=eval_limit,
            dtype=dtype,
            device=device,
        )
        value = None if adapter is None else formats.load(adapter)
        base, tokenizer = inputs.load_base(settings, bars)
        sequences = inputs.load_held_out(settings, tokenizer)
        results: dict[str, Evaluation] = {}
        if value is not None:
            with bars.task("Attaching"):
                attach(base, value, trainable=False, verify=verify)
        with reference(base), bars.task("Evaluating the base") as task:
            results["base"] = evaluate(base, sequences, batch_size, eval_limit, task)
        if value is not None:
            with bars.task("Evaluating the adapter") as task:
                results["adapter"] = evaluate(base, sequences, batch_size, eval_limit, task)
        _show(results, json_)


def _show(results: dict[str, Evaluation], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                name: {"loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens}
                for name, e in results.items()
            }
        )
        return
    table = Table("", "held-out loss", "perplexity", "tokens")
    for name, e in results.items():
        table.add_row(name, f"{e.loss:.6f}", f"{e.perplexity:.3f}", str(e.tokens))
    out.print(table)
