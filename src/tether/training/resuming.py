"""What a run that goes on must share with the run that began."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tether.config import LoraConfig
from tether.errors import ConfigError, DataError
from tether.training.data import Sequences
from tether.training.settings import Settings
from tether.value import Adapter

# What may differ when a run goes on; everything else would rewrite its past.
_FREE = ("steps", "epochs", "save_every", "eval_every", "eval_limit", "device")
PATHS = ("model", "data", "eval_data")


def check_same(sequences: Sequences, digest: str, path: str | None) -> None:
    """Raise for other text than the run began with.

    Args:
        sequences: read now.
        digest: of those that the run began with.
        path: of the file; None for the default text.

    Raises:
        DataError: they differ.
    """
    if sequences.digest() != digest:
        raise DataError(
            f"{path or 'the training text'}: is not what the run began with. Restore it, or begin "
            "a new run in another --out."
        )


def check_adapter(path: Path, stored: Adapter, lora: LoraConfig) -> None:
    """Raise for an adapter that is not the run's own: one of the same shapes would fit.

    Args:
        path: of its file.
        stored: what is in it.
        lora: what the run began with.

    Raises:
        ConfigError: naming the setting that differs.
    """
    for name, value in lora.to_dict().items():
        found = stored.config.get(name, value)
        if found != value:
            raise ConfigError(
                f"{path}: {name} is {found!r}, the run began with {value!r}. Put the run's own "
                "adapter back, or begin a new run in another --out."
            )


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Paths that hold wherever a run is resumed from; hub ids and missing files as they are.

    Args:
        values: settings by name.

    Returns:
        the same, with absolute paths.
    """
    paths = {n: v for n, v in values.items() if n in PATHS and v is not None and Path(v).exists()}
    return values | {name: str(Path(value).resolve()) for name, value in paths.items()}


def changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Settings for a run that goes on.

    Args:
        settings: that it began with.
        changes: given anew, by name.

    Returns:
        the settings with what may differ.

    Raises:
        ConfigError: a change that would make it another run.
    """
    for name, value in changes.items():
        field = name.removeprefix("lora.")
        if field != name:
            # By way of the whole configuration: "pissa" and PiSSA() are the same.
            lora = replace(settings.lora, **{field: value})
            before, value = settings.lora.to_dict()[field], lora.to_dict()[field]
        else:
            before = getattr(settings, name)
        if name not in _FREE and value != before:
            raise ConfigError(
                f"{name}: the run began with {before!r}; {value!r} would make it another run. "
                "Leave it out, or begin a new run in another --out."
            )
    return replace(settings, **{name: changes[name] for name in changes if name in _FREE})
