"""The start of one site: out of the cache, or found by the method and kept there."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tether import linalg, whole
from tether.cache import AnchorCache, Entry, Key
from tether.config import LoraConfig, Plan
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    ConvergenceError,
    ShapeMismatchError,
    TetherError,
)
from tether.fingerprints import fingerprint_tensor, sha256
from tether.linalg import Certificate
from tether.methods import Context, Method
from tether.provenance import Fingerprint
from tether.quantized import Quantized
from tether.value import Factors, LayerAdapter

# |W_q - W| / |W| above which W_q is no quantised W: 4 bits make 0.1, 2 bits about 0.35.
_FARTHEST = 0.5
# Values of a weight below which finding its anchor costs no more than looking it up.
_CACHED = 1 << 14


@dataclass(frozen=True, slots=True)
class Job:
    """One site whose start is to be found.

    Attributes:
        plan: the site, its rank and scaling.
        read: gives the values to start from; called once, when its turn has come.
        held: what the base holds at a quantised site, or None.
        original: whether `read` gives the weight before it was quantised, not what is held.
    """

    plan: Plan
    read: Callable[[], Tensor]
    held: Quantized | None = None
    original: bool = False

    @property
    def path(self) -> str:
        """Of the site."""
        return self.plan.site.path

    @property
    def cost(self) -> int:
        """About how long it takes, beside other jobs."""
        layout = self.plan.site.layout
        small, large = sorted((layout.out_features, layout.in_features))
        return small * large * min(small, 16 * self.plan.rank)


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What was found for a site.

    Attributes:
        layer: the start of the adapter there.
        fingerprint: of the base weight.
        certificate: of the decomposition, if the method has one.
        cached: whether it came out of the cache.
        gap: |W_q − W| / |W| (Frobenius) from the weight W that it was found in to the one W_q that
            the quantised base holds; None where these are the same.
    """

    layer: LayerAdapter
    fingerprint: Fingerprint
    certificate: Certificate | None
    cached: bool
    gap: float | None = None


@torch.no_grad()
def find_start(job: Job, config: LoraConfig, cache: AnchorCache | None) -> Start:
    """Find the start of one site.

    Args:
        job: the site.
        config: the method and the rest of what applies to all sites.
        cache: where to look and what to add to; None to do neither.

    Returns:
        the start.

    Raises:
        WeightError: the weight is NaN or Inf.
        BaseMismatchError: the base's quantised weight is not that of the original.
        TetherError: of the method, naming the site.
    """
    weight = job.read()
    digest, dtype = _name(job, weight)
    key = None if cache is None else _key(job, weight, config, digest, dtype)
    if cache is None or key is None:
        return _start(job, weight, config, _compute(job, weight, config, digest), cached=False)
    entry = cache.find(key, job.plan.rank, job.plan.scaling, config.method)
    if entry is not None:
        # It may be a part of a larger start, which the method has cut.
        _checked(entry.factors, config.method, job)
        return _start(job, weight, config, entry, cached=True)
    found = _compute(job, weight, config, digest)
    cache.store(key, found)
    return _start(job, weight, config, found, cached=False)


def _name(job: Job, weight: Tensor) -> tuple[str, str]:
    """Digest and dtype of what the start is found in."""
    if job.held is not None and not job.original:
        return job.held.digest(), job.held.kind
    return sha256(weight), str(weight.dtype).removeprefix("torch.")


def _key(job: Job, weight: Tensor, config: LoraConfig, digest: str, dtype: str) -> Key | None:
    """What the site's anchor is kept under, or None if it is not worth keeping or cannot be."""
    method = config.method
    if not method.lifts or weight.numel() < _CACHED:
        return None
    kind, seed = job.plan.site.layout.kind, seed_for(config.seed, job.path)
    try:
        return Key.of(digest, tuple(weight.shape), dtype, kind, method, seed)
    except ConfigError:
        return None  # a method whose settings are no JSON values


def seed_for(seed: int, name: str) -> int:
    """A seed for one of many uses, that does not depend on the others.

    Args:
        seed: the user's.
        name: of the use, such as a site's path.

    Returns:
        63 bits.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _start(job: Job, weight: Tensor, config: LoraConfig, found: Entry, cached: bool) -> Start:
    method, layout = config.method, job.plan.site.layout
    anchor = found.factors if method.lifts else None
    trainable = found.factors.zeros_like() if method.lifts else found.factors
    origin, gap = found.fingerprint, None
    if job.held is not None and job.original:
        before, weight = weight, job.held.dequantize()
        # The adapter belongs to the base that it is attached to, wherever its start is from.
        origin, gap = job.held.fingerprint(dense=weight), _gap(job, weight, before)
    magnitude = whole.row_lengths(layout.matrix(weight)) if config.use_dora else None
    scaling, dropout = job.plan.scaling, float(config.dropout)
    layer = LayerAdapter(trainable, anchor, scaling, layout, dropout, magnitude)
    return Start(layer, origin, _finite(found.certificate), cached, gap)


def _gap(job: Job, held: Tensor, before: Tensor) -> float:
    """How far quantising moved a weight, relative; raise if it is not that weight."""
    exact = before.to(held.device).double()
    size = float(torch.linalg.vector_norm(exact))
    apart = float(torch.linalg.vector_norm(held.double() - exact))
    gap = apart / size if size > 0 else apart
    # Not gap >= _FARTHEST: NaN must not pass.
    if not gap < _FARTHEST:
        assert job.held is not None
        raise BaseMismatchError(
            f"site {job.path!r}: the base's weight ({job.held.kind}) lies {gap:.2g} of |W| from "
            f"the one in weights_from; quantising moves it by less than {_FARTHEST}. Give the "
            "folder of the model that was quantised, or leave weights_from out."
        )
    return gap


def _finite(certificate: Certificate | None) -> Certificate | None:
    """A certificate that can be saved: neither a method nor a file of the cache need give one."""
    if certificate is None:
        return None
    numbers = (certificate.product_error, certificate.excess)
    return certificate if all(map(math.isfinite, numbers)) else None


def _compute(job: Job, weight: Tensor, config: LoraConfig, digest: str) -> Entry:
    label = f"site {job.path!r}"
    # float64 is checked as what is decomposed: values beyond float32 are infinite there.
    checked = weight.float() if weight.dtype == torch.float64 else weight
    linalg.check_finite(checked, f"{label}: weight {tuple(weight.shape)}")
    method, rank = config.method, job.plan.rank
    matrix = job.plan.site.layout.matrix(weight)
    if not getattr(method, "any_dtype", False):
        matrix = matrix.float()
    generator = torch.Generator().manual_seed(seed_for(config.seed, job.path))
    state = generator.get_state()
    certificates: list[Certificate] = []
    context = Context(job.path, job.plan.scaling, generator, certificates.append)
    try:
        factors = method.start(matrix, rank, context)
    except TetherError as error:
        raise type(error)(f"{label}: {error}") from error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(f"{label}: {error}") from error
    if getattr(method, "deterministic", False) and not torch.equal(state, generator.get_state()):
        raise ConfigError(
            f"{label}: method {method.name!r} says that it is deterministic, and used the "
            "generator. Its starts would be cached for all seeds; drop one of the two."
        )
    factors = _checked(factors, method, job)
    factors = Factors(factors.A.cpu().contiguous(), factors.B.cpu().contiguous())
    certificate = certificates[-1] if certificates else None
    if job.held is not None and not job.original:
        origin = job.held.fingerprint(digest, weight)
    else:
        origin = fingerprint_tensor(weight, digest)
    return Entry(factors, job.plan.scaling, origin, certificate)


def _checked(factors: Factors, method: Method, job: Job) -> Factors:
    """What a method gave; raise if it is not what a start must be."""
    layout, label = job.plan.site.layout, f"site {job.path!r}"
    rank, shape = job.plan.rank, (layout.out_features, layout.in_features)
    if (factors.rank, factors.shape) != (rank, shape):
        raise ShapeMismatchError(
            f"{label}: method {method.name!r} gave factors of rank {factors.rank} for a "
            f"matrix {factors.shape}; wanted rank {rank} for {shape}."
        )
    for name, factor in (("A", factors.A), ("B", factors.B)):
        linalg.check_finite(factor, f"{label}: factor {name} of method {method.name!r}")
    return factors
