"""Where an adapter came from: method, seed, version, learning rate, and its base's fingerprints."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from tether.errors import ConfigError
from tether.linalg import Certificate

_FLOATING = ("float64", "float32", "bfloat16", "float16")
_MAPPINGS = ("fingerprints", "certificates", "gaps")  # fields that are frozen


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a base tensor was when an adapter was made on it.

    Attributes:
        shape: of the stored weight.
        dtype: "float32", "bfloat16", …; of a quantised weight how: "bitsandbytes nf4", …
        sha256: hex digest of its bytes; of a quantised weight, of all that is stored.
        sha256_bfloat16: hex digest of its values rounded to bfloat16; by this one or the next the
            same checkpoint loaded in another precision is recognised.
        sha256_float16: hex digest of its values rounded to float16.
        norm: its Frobenius norm, against which |ΔW| is read.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    sha256_bfloat16: str
    sha256_float16: str
    norm: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter came from.

    Attributes:
        method: name of the method that chose the start, or "unknown".
        seed: of the method's random numbers, or None.
        tether_version: that wrote it, or None for a file of another library.
        base_model: name or path of the base, if known.
        base_class: class of the base, "transformers.….LlamaForCausalLM", if it is transformers'.
        learning_rate: it was trained with, if known.
        steps: optimizer steps it was trained for, if known.
        fingerprints: site path -> fingerprint of its base weight.
        certificates: site path -> how good the decomposition is that gave its anchor, where the
            method has one and it is known.
        gaps: site path -> |W_q - W| / |W| (Frobenius) of a quantised base W_q whose anchors were
            taken from the original weight W.
    """

    method: str
    seed: int | None = None
    tether_version: str | None = None
    base_model: str | None = None
    base_class: str | None = None
    learning_rate: float | None = None
    steps: int | None = None
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    gaps: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the types, so that what is saved can be loaded; freeze the mapping."""
        self._check("method", str)
        for name in ("tether_version", "base_model", "base_class"):
            self._check(name, str, type(None))
        for name in ("seed", "steps"):
            self._check(name, int, type(None))
        self._check("learning_rate", int, float, type(None))
        if self.learning_rate is not None and not math.isfinite(self.learning_rate):
            raise ConfigError(f"provenance: learning_rate {self.learning_rate} is not finite.")
        for path, gap in self.gaps.items():
            if type(gap) is not float or not (math.isfinite(gap) and gap >= 0):
                raise ConfigError(f"provenance: the gap of {path!r} cannot be {gap!r}.")
        for name in _MAPPINGS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def quantization(self) -> tuple[str, ...]:
        """How the base is quantised: no kind, one or more, in alphabetical order."""
        kinds = {found.dtype for found in self.fingerprints.values()}
        return tuple(sorted(kind for kind in kinds if kind not in _FLOATING))

    def _check(self, name: str, *kinds: type) -> None:
        value = getattr(self, name)
        if type(value) not in kinds:
            raise ConfigError(f"provenance: {name} cannot be {value!r}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle by value: a mapping proxy can do neither."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _MAPPINGS:
            values[name] = dict(values[name])
        return _rebuild, (values,)


def _rebuild(values: dict[str, object]) -> Provenance:
    return Provenance(**values)  # type: ignore[arg-type]
