"""peft's starts whose factors act on a residual model: which they are, and what is missing."""

from collections.abc import Mapping
from pathlib import Path

from tether.errors import UnsupportedAdapterError
from tether.value import Json

# Starts whose B·A is zero: the factors in the file act on the base itself.
PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Starts that the base's weight alone determines.
RECOMPUTED = ("pissa", "olora")


def refuse_residual(folder: Path, config: Mapping[str, Json]) -> None:
    """Refuse factors whose change cannot be told from them alone.

    Args:
        folder: of the adapter.
        config: its settings.

    Raises:
        UnsupportedAdapterError: saying what would be enough.
    """
    init = config.get("init_lora_weights", True)
    if init in PLAIN:
        return
    if not residual_start(init):
        raise UnsupportedAdapterError(
            f"{folder}: init_lora_weights is {init!r}: these factors do not act on the base "
            "itself, and their change of it cannot be told."
        )
    raise UnsupportedAdapterError(
        f"{folder}: init_lora_weights is {init!r}: these factors belong to a residual model, not "
        "to the base, and without the initial factors their change cannot be told. "
        + ways_to_rescue(init)
    )


def residual_start(init: Json) -> bool:
    """Whether factors of this start act on a residual model, base − s·B0·A0.

    Args:
        init: the file's `init_lora_weights`.

    Returns:
        whether it is one of peft's starts of that kind.
    """
    # peft compares some of these names without case.
    name = init.lower() if isinstance(init, str) else ""
    return name.startswith("pissa") or name in ("olora", "corda", "lora_ga")


def ways_to_rescue(init: Json) -> str:
    """What the change of such an adapter can be told from.

    Args:
        init: the file's `init_lora_weights`.

    Returns:
        the end of an error's sentence.
    """
    alone = isinstance(init, str) and init.lower() in RECOMPUTED
    return (
        "Give the adapter as it was saved before training (--anchor DIR; in Python anchor=), or "
        "the residual model and the base model (--residual DIR --base DIR; residual=, base=)"
        + (", or the base model alone (--base DIR; base=)." if alone else ".")
    )
