"""Fingerprints of base tensors: is this the model that the adapter was made on?"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tether.errors import BaseMismatchError, MetaTensorError
from tether.provenance import Fingerprint
from tether.value import CHILD

# How to fingerprint parameters that are no plain tensors, of a module; `tether.quantized` adds its.
readers: list[Callable[[str, Tensor, nn.Module], Fingerprint | None]] = []
_CHUNK = 1 << 18  # values hashed at a time: bounds the extra memory, and stays in the cache


@torch.no_grad()
def fingerprint_tensor(tensor: Tensor, sha256: str | None = None) -> Fingerprint:
    """Digest one tensor's values.

    Args:
        tensor: floating, any shape, device and strides; read, never written.
        sha256: of its bytes, where that is known already.

    Returns:
        Fingerprint over the values in row-major order.
    """
    dtypes = {tensor.dtype, torch.bfloat16, torch.float16}
    if sha256 is not None:
        dtypes.remove(tensor.dtype)
    digests = {dtype: hashlib.sha256() for dtype in dtypes}
    square = 0.0
    # Row by row, so that neither digests nor norm depend on how the tensor lies in memory.
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        exact = chunk.double()
        square += float(torch.dot(exact, exact))
        for dtype, digest in digests.items():
            digest.update(raw_bytes(chunk.to(dtype)))
    found = {dtype: digest.hexdigest() for dtype, digest in digests.items()}
    if sha256 is not None:
        found[tensor.dtype] = sha256
    return Fingerprint(
        shape=tuple(tensor.shape),
        dtype=_name(tensor.dtype),
        sha256=found[tensor.dtype],
        sha256_bfloat16=found[torch.bfloat16],
        sha256_float16=found[torch.float16],
        norm=math.sqrt(square),
    )


def fingerprint(model: nn.Module) -> dict[str, Fingerprint]:
    """Fingerprints of a model's own parameters, without attached adapters.

    Two models with equal results are the same, bit for bit.

    Args:
        model: any module; read only.

    Returns:
        parameter name ("model.layers.0.mlp.up_proj.weight") -> fingerprint, of those that are
        floating point or quantised.

    Raises:
        MetaTensorError: a parameter has no values.
        UnsupportedModuleError: one is quantised in a way that is not known.
    """
    own = {n: p for n, p in model.named_parameters() if f".{CHILD}." not in f".{n}"}
    for name, parameter in own.items():
        if parameter.is_meta:
            raise MetaTensorError(f"{name}: is on the meta device, without values. Load it first.")
    found = {}
    for name, parameter in own.items():
        module = model.get_submodule(name.rpartition(".")[0])
        read = (reader(name, parameter, module) for reader in readers)
        print_ = next((each for each in read if each is not None), None)
        if print_ is None and parameter.is_floating_point():
            print_ = fingerprint_tensor(parameter)
        if print_ is not None:
            found[name] = print_
    return found


def check_fingerprint(path: str, tensor: Tensor | Fingerprint, expected: Fingerprint) -> None:
    """Raise unless `tensor` is what `expected` was taken from.

    Equal bytes pass. So does the same checkpoint loaded in another precision: there the values
    rounded to one of the half precisions must be equal.

    Args:
        path: site path, for the message.
        tensor: the base weight here, or its fingerprint where that is known.
        expected: the fingerprint stored with the adapter.

    Raises:
        BaseMismatchError: naming the site, both values and what to do.
    """
    if isinstance(tensor, Tensor):
        # One digest instead of three, and a norm, where the dtype is the same.
        known = sha256(tensor) if _name(tensor.dtype) == expected.dtype else None
        if known == expected.sha256 and tuple(tensor.shape) == expected.shape:
            return
        found = fingerprint_tensor(tensor, known)
    else:
        found = tensor
    rounded = found.dtype != expected.dtype and (
        found.sha256_bfloat16 == expected.sha256_bfloat16
        or found.sha256_float16 == expected.sha256_float16
    )
    if found.shape == expected.shape and (found.sha256 == expected.sha256 or rounded):
        return
    raise BaseMismatchError(
        f"site {path!r}: the base weight here is {found.dtype} {found.shape} "
        f"sha256 {found.sha256[:12]}…, the adapter was made on {expected.dtype} "
        f"{expected.shape} sha256 {expected.sha256[:12]}…. Load the base model that the adapter "
        "was made on, or insist with verify=False (--no-verify) if you know that it belongs here."
    )


def sha256(tensor: Tensor) -> str:
    """Digest a tensor's values.

    Args:
        tensor: any shape, dtype, device and strides.

    Returns:
        hex digest of its bytes in row-major order: `Fingerprint.sha256`.
    """
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values in row-major order.

    Args:
        tensor: any shape, dtype, device and strides.

    Returns:
        a view where the tensor lies so on the CPU, else of a copy.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
