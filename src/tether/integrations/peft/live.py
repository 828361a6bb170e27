"""A live peft model, looked at. Nothing is changed."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from tether.errors import (
    ConfigError,
    MergedError,
    UnknownNameError,
    UnsupportedAdapterError,
    nearest,
)
from tether.integrations.peft.place import Place, places_of
from tether.start import original

# Fields that are read, or that say nothing about what the factors mean. Any other field that is
# set is refused: it may change the model.
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora"),
        *("modules_to_save", "megatron_core", "qalora_group_size", "runtime_config"),
        *("eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    }
)
_PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """A peft model, and its places in the base's order.

    Attributes:
        model: the PeftModel, out of any compiled wrapper.
        places: path -> place.
        sharing: path -> paths of all modules that have its weight, itself among them.
    """

    model: Any
    places: Mapping[str, Place]
    sharing: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: Any) -> "Live":
        """Look at a peft model.

        Args:
            model: a PeftModel, compiled or not.

        Returns:
            what is on it.

        Raises:
            ConfigError: it is no peft model with a LoRA.
            MergedError: an adapter is merged into the base.
            UnsupportedAdapterError: it holds something that a LoRA cannot say.
        """
        if not is_peft(model):
            raise ConfigError(
                f"{type(model).__name__} is no peft model with a LoRA. Give the PeftModel that "
                "get_peft_model or PeftModel.from_pretrained returned."
            )
        inner = original(model)
        places = {place.path: place for place in places_of(inner.get_base_model())}  # type: ignore[operator]
        for place in places.values():
            if place.lora is not None and place.lora.merged_adapters:
                raise MergedError(
                    f"site {place.path!r}: adapters {place.lora.merged_adapters} are merged into "
                    "the base's weight. Call unmerge_adapter() on the peft model first."
                )
        return cls(inner, places, _sharing(places))

    @property
    def base(self) -> nn.Module:
        """The base model, with peft's layers in it."""
        base: nn.Module = self.model.get_base_model()
        return base

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters."""
        return tuple(self.model.peft_config)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that take part in the forward pass."""
        off = any(p.lora.disable_adapters for p in self.places.values() if p.lora is not None)
        return () if off else tuple(self.model.active_adapters)

    def name(self, name: str | None) -> str:
        """The adapter that is meant.

        Args:
            name: of the adapter; None for the only one, or the only active one.

        Returns:
            its name.

        Raises:
            UnknownNameError: there is none of that name, or several could be meant.
        """
        if name is None:
            found = self.names if len(self.names) == 1 else tuple(self.model.active_adapters)
            if len(found) != 1:
                raise UnknownNameError(
                    f"the model has the adapters {list(self.names)}, of which {list(found)} are "
                    "active; name one with adapter_name."
                )
            return str(found[0])
        if name not in self.names:
            raise UnknownNameError(
                f"the peft model has no adapter {name!r}. {nearest(name, self.names)}"
            )
        return name

    def config(self, name: str) -> Any:
        """An adapter's configuration, checked to say only what a LoRA of tether can hold.

        Args:
            name: of the adapter.

        Returns:
            peft's own object; not to be changed.

        Raises:
            UnsupportedAdapterError: naming the field.
        """
        config = self.model.peft_config[name]
        if config.peft_type != "LORA":
            raise UnsupportedAdapterError(
                f"adapter {name!r} is of type {config.peft_type}, not LORA."
            )
        for field in fields(config):
            value = getattr(config, field.name)
            if value and field.name not in _UNDERSTOOD:
                raise UnsupportedAdapterError(
                    f"adapter {name!r} was made with {field.name}={value!r}, which a plain LoRA "
                    "cannot hold; leaving it out would change the model."
                )
        init = method(config)
        if init not in _PLAIN and not splits(config):
            raise UnsupportedAdapterError(
                f"adapter {name!r} was made with init_lora_weights={init!r}: its factors make up "
                "for an error of the base in this model and belong to it, not to the original."
            )
        return config

    def sites(self, name: str) -> dict[str, Place]:
        """The places where an adapter has factors.

        Args:
            name: of the adapter.

        Returns:
            path -> place.
        """
        return {path: place for path, place in self.places.items() if name in place.adapters}

    def saved(self, name: str) -> dict[str, Place]:
        """The modules that an adapter trains whole.

        Args:
            name: of the adapter.

        Returns:
            path -> place.
        """
        return {
            path: place
            for path, place in self.places.items()
            if place.saved is not None and name in place.saved.modules_to_save
        }


def is_peft(model: object) -> bool:
    """Whether this is a peft model with a LoRA, told without importing peft.

    Args:
        model: anything.

    Returns:
        True if it is.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, nn.Module):
        return False
    inner = original(model)
    if not isinstance(inner, peft.PeftModel):
        return False
    return any(config.peft_type == "LORA" for config in inner.peft_config.values())


def method(config: Any) -> str | bool:
    """How an adapter was started, by peft's name: lower case, as peft compares it.

    Args:
        config: of the adapter.

    Returns:
        init_lora_weights.
    """
    init: str | bool = config.init_lora_weights
    return init.lower() if isinstance(init, str) else init


def splits(config: Any) -> bool:
    """Whether an adapter's start was taken out of the base's linear weights.

    Args:
        config: of the adapter.

    Returns:
        True for pissa, pissa_niter_*, olora, corda and lora_ga.
    """
    init = method(config)
    return isinstance(init, str) and (
        init.startswith(("pissa", "corda")) or init in ("olora", "lora_ga")
    )


def _sharing(places: Mapping[str, Place]) -> dict[str, tuple[str, ...]]:
    """Tied weights: peft changes all of them when it changes one."""
    found: dict[int, list[str]] = {}
    for path, place in places.items():
        weight = place.module._parameters.get("weight")
        if weight is not None:
            found.setdefault(id(weight), []).append(path)
    return {path: tuple(paths) for paths in found.values() for path in paths}
