"""The options of an adapter, as fields of LoraConfig."""

from contextlib import suppress
from typing import Annotated, Any

import typer

from tether import methods
from tether.errors import ConfigError

InitOption = Annotated[str, typer.Option(help=f"Method: {', '.join(methods.names())}.")]
RankOption = Annotated[int, typer.Option(help="Rank r.")]
AlphaOption = Annotated[float | None, typer.Option(help="Scaling is alpha/r. Default: r.")]
RsloraOption = Annotated[bool, typer.Option("--rslora", help="Scaling alpha/sqrt(r).")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(help="Module name or glob; repeat for more. Default: all-linear."),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Module name or glob to leave out; repeatable.")
]
LayersOption = Annotated[
    list[int] | None, typer.Option(help="Index of a layer to adapt; repeatable.")
]
RankPatternOption = Annotated[
    list[str] | None, typer.Option(help="NAME=RANK for some modules; repeatable.")
]
AlphaPatternOption = Annotated[
    list[str] | None, typer.Option(help="NAME=ALPHA for some modules; repeatable.")
]
DoraOption = Annotated[bool, typer.Option("--dora", help="Train the rows' lengths too.")]

# Option -> field of LoraConfig.
FIELDS = {
    "init": "init",
    "rank": "rank",
    "alpha": "alpha",
    "rslora": "use_rslora",
    "dropout": "dropout",
    "target": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "dora": "use_dora",
    "bias": "bias",
    "save_module": "modules_to_save",
    "after": "after_save",
}


def lora_fields(params: dict[str, Any]) -> dict[str, Any]:
    """The options of the adapter as fields of LoraConfig, without those left out.

    Args:
        params: option -> value; others are ignored.

    Returns:
        field -> value.

    Raises:
        ConfigError: a pattern is not NAME=NUMBER.
    """
    values = {FIELDS[option]: value for option, value in params.items() if option in FIELDS}
    for field, number in (("rank_pattern", int), ("alpha_pattern", float)):
        if values.get(field):
            values[field] = dict(_pair(field, text, number) for text in values[field])
    return {field: value for field, value in values.items() if value not in (None, [], ())}


def _pair(field: str, text: str, number: type[int] | type[float]) -> tuple[str, int | float]:
    name, _, value = text.rpartition("=")
    with suppress(ValueError):
        if name:
            return name, number(value)
    option = "--" + field.replace("_", "-")
    raise ConfigError(f"{option}: {text!r} is not NAME=NUMBER, such as k_proj=8.")
