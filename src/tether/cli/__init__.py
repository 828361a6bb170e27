"""The command line: `tether train | eval | convert | inspect`. One file per command."""

import typer

from tether.cli import convert, evaluate, inspect, train

app = typer.Typer(
    name="tether",
    help="LoRA adapters that start from the weights they adapt, and never damage them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (train, evaluate, convert, inspect):
    app.command(_command.NAME)(_command.command)


def main() -> None:
    """Run the command line."""
    app()
