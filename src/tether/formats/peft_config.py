"""The settings of a LoRA that peft wrote, and where its tensors are.

What tether does not understand is refused by name.
"""

import math
import shlex
from collections.abc import Collection
from pathlib import Path

from tether.errors import (
    ConfigError,
    HeaderError,
    NotAnAdapterError,
    PickleRefusedError,
    UnsupportedAdapterError,
)
from tether.formats import container
from tether.formats import peft_names as names
from tether.value import Json

_MAX_CONFIG = 4 * 2**20  # bytes of adapter_config.json
# Fields that are read, or that say nothing about what the tensors mean. Any other field that is
# set is refused: it may change the model.
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights"),
        *("use_dora", "modules_to_save"),
        *(
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
            "megatron_core",
        ),
        *("qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config"),
    }
)


def read_config(folder: Path) -> dict[str, Json]:
    """Read the settings of a PEFT LoRA.

    Args:
        folder: of the adapter.

    Returns:
        field -> value.

    Raises:
        NotAnAdapterError: there are none, or it is not a LoRA.
        HeaderError: they are malformed.
    """
    path = folder / names.CONFIG
    if not path.is_file():
        raise NotAnAdapterError(
            f"{folder}: there is no {names.CONFIG} in it. Give the folder of a PEFT adapter, or a "
            "native adapter file."
        )
    if path.stat().st_size > _MAX_CONFIG:
        raise HeaderError(f"{path}: larger than the limit of {_MAX_CONFIG} bytes.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: not valid UTF-8: {error}.") from error
    config = container.parse_json(text, str(path), _MAX_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise NotAnAdapterError(f"{path}: peft_type is {kind!r}; only 'LORA' is read.")
    return config


def weights_file(folder: Path) -> Path:
    """The file that holds a PEFT adapter's tensors.

    Args:
        folder: of the adapter.

    Returns:
        its path.

    Raises:
        PickleRefusedError: the weights are a .bin.
        NotAnAdapterError: there are none.
    """
    weights = folder / names.WEIGHTS
    if weights.is_file():
        return weights
    pickled = folder / names.PICKLED_WEIGHTS
    if pickled.exists():
        line = (
            "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() "
            "for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
        )
        raise PickleRefusedError(
            f"{pickled}: is a pickle; reading it can run code, so it is refused. Convert it with: "
            f'python -c "{line}" {shlex.quote(str(pickled))} {shlex.quote(str(weights))}'
        )
    raise NotAnAdapterError(
        f"{weights}: there is no such file. Give the whole folder of a PEFT adapter."
    )


def refuse_unsupported(folder: Path, config: dict[str, Json], also: Collection[str] = ()) -> None:
    """Refuse settings that change the model and that tether does not read.

    Args:
        folder: of the adapter.
        config: its settings.
        also: fields that the caller reads.

    Raises:
        UnsupportedAdapterError: naming the field.
    """
    for field, value in config.items():
        if value and field not in _UNDERSTOOD and field not in also:
            raise UnsupportedAdapterError(
                f"{folder}: it was trained with {field}={value!r}, which a plain LoRA cannot hold; "
                "reading it without would change the model."
            )


def flag(config: dict[str, Json], field: str) -> bool:
    """A setting that is true or false.

    Args:
        config: all of them.
        field: its name.

    Returns:
        its value; False where it is not given.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(field)
    if not (value is None or isinstance(value, bool)):
        raise ConfigError(f"{field} is {value!r}, not true or false.")
    return bool(value)


def number(config: dict[str, Json], field: str, default: float) -> float:
    """A setting that is a number.

    Args:
        config: all of them.
        field: its name.
        default: its value where it is not given.

    Returns:
        a finite number.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{field} is {value!r}, not a number.")
    return float(value)
