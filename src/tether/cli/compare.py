"""`tether compare`: did the adapter become something else?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tether import formats
from tether.cli import comparison
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.compare import check_bases
from tether.errors import ConfigError
from tether.report import compare as pages
from tether.report import figures
from tether.report.compared import LETTERS, measure
from tether.training import inputs
from tether.training.behaviour import Behaviour, behaviour, put_on
from tether.training.report import Reporter
from tether.training.settings import Settings
from tether.value import Adapter

NAME = "compare"


def command(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Native files or PEFT folders, two to eight; the first is A."),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id: adds logits, losses and texts on this model."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="With --base: .txt or .jsonl. Default: from Python's documentation."),
    ] = None,
    limit: Annotated[int, typer.Option(help="With --base: most sequences.")] = 32,
    block: Annotated[int, typer.Option(help="With --base: tokens per sequence.")] = 128,
    generate: Annotated[
        int, typer.Option(help="With --base: most tokens of each text; 0 for no texts.")
    ] = 32,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="With --base: a text to continue; repeatable. Default: from the data."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write a page (HTML) with all of it.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Check that all were made on one base, and on this one.")
    ] = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare adapters of one base with the first of them: A.

    From the files alone: relative error and angle of the changes, the directions they share, and
    what each would lose in fewer bits. With --base also how they differ in use.
    """
    with guarded(json_, debug):
        use_all_cores()
        _check(adapters, base, data, prompt, limit, generate, out_file)
        bars = Bars(quiet=json_)
        values = dict(zip(_names(adapters), map(formats.load, adapters), strict=True))
        checked = _check_bases(values) if verify else 0
        found = None
        if base is not None:
            settings = Settings(
                model=base,
                eval_data=data,
                block=block,
                eval_limit=limit,
                dtype=dtype,
                device=device,
            )
            found = _behaviour(settings, values, prompt or [], generate, verify, bars)
        sizes = {name: _size(path) for name, path in zip(values, adapters, strict=True)}
        compared = measure(values, sizes, found, bars)
        if out_file is not None:
            with bars.task("Drawing the page"):
                pages.write(compared, out_file)
        if json_:
            written = None if out_file is None else str(out_file)
            said = comparison.to_json(compared, adapters)
            print_json(said | {"fingerprints_checked": checked, "written": written})
        else:
            comparison.show(compared)
            if out_file is not None:
                size = out_file.stat().st_size / 1e6
                out.print(f"wrote {out_file} ({size:.2f} MB)", soft_wrap=True)


def _check(
    adapters: Sequence[Path],
    base: str | None,
    data: str | None,
    prompts: Sequence[str] | None,
    limit: int,
    generate: int,
    out_file: Path | None,
) -> None:
    """Refuse early what cannot be meant."""
    if not 2 <= len(adapters) <= len(LETTERS):
        raise ConfigError(f"{len(adapters)} adapters: give two to {len(LETTERS)}.")
    if base is None and (data is not None or prompts):
        option = "--data" if data is not None else "--prompt"
        raise ConfigError(f"{option} needs a model to run: add --base MODEL.")
    if limit < 1 or generate < 0:
        raise ConfigError(
            f"--limit {limit} must be at least 1, and --generate {generate} 0 or more."
        )
    if prompts and generate == 0:
        raise ConfigError("--prompt asks for texts and --generate 0 for none; leave one out.")
    if out_file is None:
        return
    if (missing := figures.missing_library()) is not None:
        raise missing
    if any(out_file.resolve().is_relative_to(path.resolve()) for path in adapters):
        raise ConfigError(f"--out {out_file}: is, or lies in, an adapter that is only read.")


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a path given twice has a number."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(
            (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)),
            len(own),
        )
        name = "/".join(own[-length:])
        again = sum(each == own for each in parts[: len(names)])
        names.append(name if again == 0 else f"{name} ({again + 1})")
    return names


def _check_bases(adapters: dict[str, Adapter]) -> int:
    """Every pair: a site may be in two others and not in the first. How many could be checked."""
    named = list(adapters.items())
    return sum(
        check_bases(a, b, (name, other))
        for place, (other, b) in enumerate(named)
        for name, a in named[:place]
    )


def _behaviour(
    settings: Settings,
    adapters: dict[str, Adapter],
    prompts: Sequence[str],
    length: int,
    verify: bool,
    reporter: Reporter,
) -> Behaviour:
    model, tokenizer = inputs.load_base(settings, reporter)
    sequences = inputs.load_held_out(settings, tokenizer)
    lettered = dict(zip(LETTERS, adapters.values(), strict=False))
    with reporter.task("Attaching"):
        put_on(model, lettered, verify)
    return behaviour(
        model,
        tokenizer,
        list(lettered),
        sequences,
        batch_size=settings.batch_size,
        limit=settings.eval_limit,
        prompts=prompts,
        length=length,
        reporter=reporter,
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(file.stat().st_size for file in files)
