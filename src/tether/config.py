"""LoraConfig: what to adapt and how. Validated when made; what needs the model, when planned."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TypeVar

from torch import nn

from tether import methods, sites, whole
from tether.errors import ConfigError, RankTooLargeError, UnknownNameError, nearest
from tether.methods import Method
from tether.sites import Site
from tether.value import Json

Value = TypeVar("Value", int, float)
BIASES = ("none", "lora_only", "all")
AFTER = ("keep", "offload", "detach")  # what becomes of a live adapter once it is saved


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how to start.

    Attributes:
        init: name of a method ("pissa", "olora", "milora", "lora", "gaussian", "orthogonal"), or
            a method object such as `PiSSA(tolerance=1e-4)`.
        rank: r, of every site that `rank_pattern` does not name.
        alpha: the scaling is alpha/r; None for alpha = r of each site, a scaling of 1.
        use_rslora: scaling alpha/√r instead (arXiv:2312.03732), with the patterns' own r and alpha.
        dropout: probability of dropping an input of the adapter while training, in [0, 1).
        target_modules: "all-linear" (the output head excluded), or names: whole paths, last
            components, or globs.
        exclude_modules: names to leave out.
        layers_to_transform: indices of the layers to adapt; None for all.
        rank_pattern: name -> rank; the first that matches a site wins.
        alpha_pattern: name -> alpha; the first that matches a site wins.
        seed: of the random numbers of the start.
        use_dora: train the lengths of the weight's rows too (DoRA, arXiv:2402.09353).
        bias: "none"; "lora_only": train the biases of the adapted modules; "all": every bias.
        modules_to_save: names of modules to train whole, such as a new classification head.
        after_save: what becomes of the live adapter after `save_as_lora`: "keep", "offload" or
            "detach".
    """

    init: str | Method = "pissa"
    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: str | Sequence[str] = sites.ALL_LINEAR
    exclude_modules: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    after_save: str = "keep"

    def __post_init__(self) -> None:
        """Check every value; raise ConfigError naming the field."""
        self._check_init()
        _check_integer("rank", self.rank, 1)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        self._check_choices()
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout!r}.")
        if not isinstance(self.target_modules, str):
            object.__setattr__(
                self, "target_modules", _names("target_modules", self.target_modules)
            )
        for name in ("exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        self._freeze_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _frozen_pattern(name, getattr(self, name)))
        for pattern, rank in self.rank_pattern.items():
            _check_integer(f"rank_pattern[{pattern!r}]", rank, 1)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        # torch's generators take 64 bits.
        _check_integer("seed", self.seed, 0, 2**63 - 1)

    def _check_init(self) -> None:
        if isinstance(self.init, str):
            methods.get(self.init)
        elif isinstance(self.init, type) or not isinstance(self.init, Method):
            raise ConfigError(f"init must be a method or its name, not {self.init!r}.")

    def _check_choices(self) -> None:
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        for name, choices in (("bias", BIASES), ("after_save", AFTER)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}."
                )

    def _freeze_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if not isinstance(layers, int | Iterable):
            raise ConfigError(f"layers_to_transform must be whole numbers, not {layers!r}.")
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        for index in layers:
            _check_integer("layers_to_transform", index, 0)
        if not layers:
            raise ConfigError("layers_to_transform is empty; use None for all layers.")
        object.__setattr__(self, "layers_to_transform", layers)

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle by value: a mapping proxy can do neither."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        patterns = ("rank_pattern", "alpha_pattern")
        return _rebuild, (values | {name: dict(values[name]) for name in patterns},)

    @property
    def method(self) -> Method:
        """The method that `init` names."""
        return methods.get(self.init) if isinstance(self.init, str) else self.init

    def to_dict(self) -> dict[str, Json]:
        """The settings as JSON values; `from_dict` is the inverse.

        Returns:
            field -> value; `init` as {"name": …, **settings of the method}.
        """
        values: dict[str, Json] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[item.name] = value
        values["init"] = {"name": self.method.name, **methods.method_settings(self.method)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Json]) -> "LoraConfig":
        """Rebuild a configuration from `to_dict`.

        Args:
            values: field -> value; missing fields take their defaults.

        Returns:
            the configuration.

        Raises:
            UnknownNameError: a field that does not exist; the nearest are offered.
        """
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise UnknownNameError(f"LoraConfig has no field {name!r}. {nearest(name, known)}")
        arguments = dict(values)
        init = arguments.get("init")
        if isinstance(init, dict):
            settings = {key: value for key, value in init.items() if key != "name"}
            arguments["init"] = methods.get(str(init.get("name")), settings)  # type: ignore[assignment]
        return cls(**arguments)  # type: ignore[arg-type]


def _rebuild(values: dict[str, object]) -> LoraConfig:
    return LoraConfig(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one site will get.

    Attributes:
        site: the weight.
        rank: r there.
        scaling: s there.
    """

    site: Site
    rank: int
    scaling: float


def plan(model: nn.Module, config: LoraConfig) -> list[Plan]:
    """Settle a configuration against a model.

    Args:
        model: read only.
        config: the settings.

    Returns:
        one plan per site, in the model's order.

    Raises:
        ConfigError: and its kinds, as of `sites.find`; a pattern that matches no site; a rank
            larger than a site allows.
    """
    layers = config.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    found = sites.find(model, config.target_modules, config.exclude_modules, layers)
    if sites.ALL_LINEAR in config.target_modules:
        # A module is adapted or trained whole, not both; "all" means all others.
        saved = tuple(f"{p}." for p in whole.saved_modules(model, config.modules_to_save))
        found = [site for site in found if not f"{site.path}.".startswith(saved)]
    paths = [site.path for site in found]
    _check_patterns("rank_pattern", config.rank_pattern, paths)
    _check_patterns("alpha_pattern", config.alpha_pattern, paths)
    return [_plan_site(site, config) for site in found]


def _plan_site(site: Site, config: LoraConfig) -> Plan:
    rank = _first_match(config.rank_pattern, site.path) or config.rank
    smaller = min(site.layout.out_features, site.layout.in_features)
    if rank > smaller:
        shape = (site.layout.out_features, site.layout.in_features)
        glob = "*." + site.path.rsplit(".", 1)[-1] if "." in site.path else site.path
        raise RankTooLargeError(
            f"site {site.path!r}: rank {rank} exceeds min(shape) {smaller} of weight {shape}. "
            f"Use rank <= {smaller}, or rank_pattern={{{glob!r}: {smaller}}}."
        )
    alpha = _first_match(config.alpha_pattern, site.path) or config.alpha
    alpha = float(rank if alpha is None else alpha)
    return Plan(site, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _first_match(patterns: Mapping[str, Value], path: str) -> Value | None:
    return next((value for key, value in patterns.items() if sites.matches(key, path)), None)


def _check_patterns(name: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(sites.matches(pattern, path) for path in paths):
            valid = {path.rsplit(".", 1)[-1] for path in paths} | set(paths)
            raise UnknownNameError(
                f"{name}: {pattern!r} matches none of the {len(paths)} sites. "
                f"{nearest(pattern, valid)}"
            )


def _names(name: str, value: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be a list of names, not {value!r}.")
    result = (value,) if isinstance(value, str) else tuple(value)
    for item in result:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name} must hold names, not {item!r}.")
    if name == "target_modules" and not result:
        raise ConfigError("target_modules is empty; name modules, or use 'all-linear'.")
    return result


def _frozen_pattern(name: str, value: object) -> Mapping[str, float]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must map names to numbers, not {value!r}.")
    return MappingProxyType(dict(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_alpha(name: str, value: object) -> None:
    if not (_is_number(value) and value > 0):  # type: ignore[operator]
        raise ConfigError(f"{name} must be a positive number, not {value!r}.")


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        limit = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise ConfigError(f"{name} must be a whole number, {limit}, not {value!r}.")
