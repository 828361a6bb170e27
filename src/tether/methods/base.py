"""What a method is, and the table of them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tether.errors import ConfigError, UnknownMethodError, UnknownNameError, nearest
from tether.linalg import Certificate
from tether.value import Factors, Json


def _forget(certificate: Certificate) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a method may use besides the weight.

    Attributes:
        path: of the site.
        scaling: s in ΔW = s·B·A.
        generator: for random numbers, on the CPU, seeded by the configuration's seed and the
            path: the same bits whatever the device and the order of the sites.
        record: takes the certificate of the decomposition, to be kept in the provenance.
    """

    path: str
    scaling: float
    generator: torch.Generator
    record: Callable[[Certificate], object] = _forget


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass that is its own configuration.

    Starts that lift are cached, see `tether.cache`. A method may have, besides, the class variables
    `deterministic` (False): True if its start depends on weight, rank and scaling alone, neither on
    the generator nor on the path; without it an entry holds for one seed only;
    `algorithm` (1): a number to be raised whenever the same weight gives another start than before;
    `any_dtype` (False): True if it takes a weight of any floating dtype, so that one in half
    precision need not be copied to float32 whole. See also `Nested`.

    Attributes:
        name: set by `register`.
        lifts: True if the start is taken from the weight, so that s·B0·A0 is not zero: it becomes
            the site's anchor. False if B·A = 0 at the start: the factors are trained themselves.
    """

    name: ClassVar[str]
    lifts: ClassVar[bool]

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        """The initial factors of one site.

        Args:
            weight: (out, in), finite; float32, or of the base's dtype for a method of `any_dtype`.
                Read, never written.
            rank: 1 <= rank <= min(out, in).
            context: path, scaling, generator.

        Returns:
            A (rank, in) and B (out, rank): float32, contiguous, on the weight's device.
        """
        ...


@runtime_checkable
class Nested(Protocol):
    """A method whose start of a small rank is a part of that of a larger one."""

    def cut(self, factors: Factors, rank: int, was: float, scaling: float) -> Factors:
        """The start of a smaller or equal rank and another scaling.

        Args:
            factors: a start of this method.
            rank: 1 <= rank <= factors.rank.
            was: the scaling that it was made with.
            scaling: the scaling wanted.

        Returns:
            A (rank, in) and B (out, rank), contiguous, not sharing memory.
        """
        ...


_METHODS: dict[str, type[Any]] = {}
M = TypeVar("M", bound=type[Any])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known as `init=name`.

    Args:
        name: not yet taken.

    Returns:
        the decorator; it sets `name` on the class.

    Raises:
        ConfigError: the name is taken, or the class is not a frozen dataclass.
    """

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ConfigError(f"method {name!r} is already {_METHODS[name].__qualname__}.")
        if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise ConfigError(f"method {name!r}: {cls.__qualname__} must be a frozen dataclass.")
        cls.name = name  # type: ignore[attr-defined]
        _METHODS[name] = cls
        return cls

    return add


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def get(name: str, settings: Mapping[str, Json] | None = None) -> Method:
    """Make a method from its name.

    Args:
        name: as registered.
        settings: fields of its dataclass that differ from their defaults.

    Returns:
        the method.

    Raises:
        UnknownMethodError: no such name; the nearest are offered.
        UnknownNameError: a setting that the method does not have.
    """
    if name not in _METHODS:
        raise UnknownMethodError(f"init {name!r} is not a method. {nearest(name, _METHODS)}")
    cls = _METHODS[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in settings or {}:
        if key not in fields:
            known = nearest(key, fields) if fields else "It has none."
            raise UnknownNameError(f"method {name!r} has no setting {key!r}. {known}")
    method: Method = cls(**(settings or {}))
    return method


def method_settings(method: Method) -> dict[str, Json]:
    """A method's fields as plain values, to be stored.

    Args:
        method: a registered method.

    Returns:
        field name -> value.
    """
    return dataclasses.asdict(method)  # type: ignore[call-overload,no-any-return]
