"""The command line: `tether train | eval | convert | inspect`. One file per command."""

from importlib.metadata import version
from typing import Annotated

import typer

from tether.cli import convert, evaluate, inspect, train

app = typer.Typer(
    name="tether",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (train, evaluate, convert, inspect):
    app.command(_command.NAME)(_command.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tether {version('tether')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """LoRA adapters that start from the weights they adapt, and never damage them."""
    del version


def main() -> None:
    """Run the command line."""
    app()
