"""Is a weight quantised, and by whom? Whatever is unknown is refused by name."""

from torch import Tensor, nn

from tether import fingerprints
from tether.errors import MetaTensorError, UnsupportedModuleError
from tether.fingerprints import check_fingerprint
from tether.provenance import Fingerprint
from tether.quantized import bitsandbytes, torchao
from tether.quantized.foreign import KNOWN, check_layer
from tether.quantized.stored import Quantized

_READERS = (bitsandbytes.read, torchao.read)


def read(label: str, weight: Tensor, module: nn.Module | None = None) -> Quantized | None:
    """What a quantised weight holds.

    Args:
        label: what to call it in the message.
        weight: a parameter of the base.
        module: that holds it; a library may keep a part of it there.

    Returns:
        the quantised weight, or None for one that is not quantised, and for a DTensor.

    Raises:
        UnsupportedModuleError: quantised in a way that is not known, naming its class or dtype.
        MetaTensorError: quantised, and without values.
    """
    plain = weight.is_floating_point() and weight.element_size() > 1
    if plain and type(weight) in (nn.Parameter, Tensor):
        return None
    if any(cls.__name__ == "DTensor" for cls in type(weight).__mro__):
        return None
    if weight.is_meta:
        raise MetaTensorError(
            f"{label} {tuple(weight.shape)} ({type(weight).__name__}, {weight.dtype}) is on the "
            "meta device, without values. Load the quantised model first: by its values an adapter "
            "recognises it."
        )
    for reader in _READERS:
        found = reader(label, weight, module)
        if found is not None:
            return found
    # A subclass that keeps its values in other tensors is no plain one, whatever dtype it gives.
    if not plain or hasattr(weight, "__tensor_flatten__"):
        raise _unknown(label, weight, module)
    return None


def values(label: str, module: nn.Module) -> Tensor:
    """The values of a module's weight, as they are now.

    Args:
        label: what to call it in the message.
        module: whose `weight` is a tensor.

    Returns:
        the weight itself, or the values of a quantised one, float32.
    """
    weight = module.weight  # a parametrised one is no parameter
    assert isinstance(weight, Tensor)
    found = read(label, weight, module)
    return weight if found is None else found.dequantize()


def dense(stored: Tensor | Quantized) -> Tensor:
    """The values of a weight.

    Args:
        stored: as the base holds it.

    Returns:
        the tensor itself, or the values of a quantised one, float32.
    """
    return stored.dequantize() if isinstance(stored, Quantized) else stored


def check(path: str, stored: Tensor | Quantized, expected: Fingerprint) -> None:
    """Raise unless a weight is the one that an adapter was made on; see `check_fingerprint`.

    Args:
        path: site path, for the message.
        stored: the base weight here.
        expected: the fingerprint stored with the adapter.

    Raises:
        BaseMismatchError: naming the site, both values and what to do.
    """
    if not isinstance(stored, Quantized):
        check_fingerprint(path, stored, expected)
        return
    digest = stored.digest()
    if (stored.kind, stored.shape, digest) != (expected.dtype, expected.shape, expected.sha256):
        check_fingerprint(path, stored.fingerprint(digest), expected)


def _print(label: str, weight: Tensor, module: nn.Module) -> Fingerprint | None:
    if type(weight) in (nn.Parameter, Tensor):
        if not weight.is_floating_point():
            check_layer(label, module)
        return None
    found = read(label, weight, module)
    return None if found is None else found.fingerprint()


fingerprints.readers.append(_print)


def _unknown(label: str, weight: Tensor, module: nn.Module | None) -> UnsupportedModuleError:
    kind = type(weight)
    where = "" if module is None else f" in {type(module).__name__}"
    name = "" if kind in (nn.Parameter, Tensor) else f" ({kind.__module__}.{kind.__name__})"
    return UnsupportedModuleError(
        f"{label} of dtype {weight.dtype}{name}{where} is quantised in a way that tether does not "
        f"know; {KNOWN} it does. Load the base in one of these or unquantised, or exclude the "
        "module."
    )
