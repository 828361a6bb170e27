"""The command line: one file per command."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from tether.cli import (
    anchors,
    cache,
    combine,
    compare,
    convert,
    evaluate,
    inspect,
    merge,
    report,
    residual,
    train,
)
from tether.cli.console import show_error

app = typer.Typer(
    name="tether",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (
    train,
    anchors,
    evaluate,
    convert,
    combine,
    compare,
    merge,
    residual,
    inspect,
    report,
):
    app.command(_command.NAME)(_command.command)
app.add_typer(cache.app, name=cache.NAME)


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
    """Run the command line; a wrong option is one line and exit code 2, like any other error."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Typer's usage errors, whichever click it brings along.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        show_error("UsageError", f"{error.format_message()} See --help.", "--json" in sys.argv)
        sys.exit(2)
    sys.exit(code or 0)
