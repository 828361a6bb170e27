"""`tether report`: one training run as a page to read."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.errors import ConfigError
from tether.integrations import hub
from tether.report import run as pages

NAME = "report"


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR", help="Folder of `train`, or output_dir of an adapted Trainer."
        ),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: RUN_DIR/report.html.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the base: adds its spectra, overlaps, intruder dimensions."
        ),
    ] = None,
    base_sites: Annotated[
        int, typer.Option(help="Most weights of the base to decompose; 0: all.")
    ] = pages.BASE_SITES,
    verify: Annotated[
        bool, typer.Option(help="Check that the base is the one the adapter was made on.")
    ] = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a page about a training run: losses, where the weights changed, in how many directions.

    One HTML file without anything from the network. With --base, weights are read one at a time,
    spread evenly over the model; decomposing one takes seconds, or a minute on a large model.
    """
    with guarded(json_, debug):
        use_all_cores()
        if base_sites < 0:
            raise ConfigError(f"base_sites {base_sites} must be a number of weights, or 0 for all.")
        folder = None if base is None else Path(base)
        if base is not None and folder is not None and not folder.is_dir():
            folder = Path(hub.fetch(base))
        path = pages.write(
            run,
            out_file,
            base=folder,
            base_sites=base_sites,
            verify=verify,
            reporter=Bars(quiet=json_),
        )
        if json_:
            print_json({"written": str(path), "bytes": path.stat().st_size})
        else:
            out.print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)", soft_wrap=True)
