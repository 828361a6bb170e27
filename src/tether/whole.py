"""Parameters trained whole: biases, and the modules of `modules_to_save`. Which, and their start.

Their anchor is the base's own value; only the displacement is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tether import quantized, sites
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedModuleError,
    nearest,
)
from tether.linalg import check_finite
from tether.value import CHILD, Trained

# Modules whose bias is the last thing they add, along the channels of their output.
_ADDING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


def start(name: str, parameter: Tensor) -> Trained:
    """A parameter at its start.

    Args:
        name: of the parameter, for the message.
        parameter: of the base; read only.

    Returns:
        displacement zero on the base's own values, float32 (or float64) on the CPU.

    Raises:
        NonFiniteError: it holds NaN or Inf.
        UnsupportedModuleError: it is not floating point, or has no values.
    """
    plain = not parameter.is_meta and parameter.is_floating_point()
    # Some quantised weights give a floating dtype.
    if not plain or quantized.read(name, parameter) is not None:
        raise UnsupportedModuleError(
            f"{name}: {parameter.dtype} on device {parameter.device} cannot be trained whole. Load "
            "the base unquantised and with its weights, or leave the module out."
        )
    wide = torch.promote_types(parameter.dtype, torch.float32)
    anchor = parameter.detach().to("cpu", wide, copy=True)
    check_finite(anchor, name)
    return Trained(torch.zeros_like(anchor), anchor)


def biases(
    model: nn.Module, setting: str, paths: Sequence[str], saved: Sequence[str] = ()
) -> dict[str, Trained]:
    """The biases that a setting trains.

    Args:
        model: read only.
        setting: "none", "lora_only" or "all".
        paths: of the sites.
        saved: of the modules that are trained whole, biases and all.

    Returns:
        module path -> bias at its start.

    Raises:
        ConfigError: the setting trains no bias.
        UnsupportedModuleError: a bias that a forward hook cannot move.
    """
    if setting == "none":
        return {}
    chosen = set(paths)
    found = {}
    for path, module in sites.base_modules(model):
        if setting == "lora_only" and path not in chosen:
            continue
        if any(path == other or path.startswith(other + ".") for other in saved):
            continue
        # A bias of another name (in_proj_bias), or one that the module uses in its own way.
        odd = [n for n, _ in module.named_parameters(recurse=False) if n.endswith("_bias")]
        own = module._parameters.get("bias")
        if own is None and not odd:
            continue
        if odd or not (isinstance(module, _ADDING) or sites.is_conv1d(module)):
            raise UnsupportedModuleError(
                f"module {path!r}: {type(module).__name__} uses its bias in a way that cannot be "
                "moved from outside. Use bias='lora_only', or train the module whole with "
                "modules_to_save."
            )
        assert own is not None
        found[path] = start(f"{path}.bias", own)
    if not found:
        raise ConfigError(f"bias={setting!r}: no such module of the model has a bias. Use 'none'.")
    return found


def saved_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that names select, to be trained whole.

    Args:
        model: read only.
        names: patterns as of `sites.matches`.

    Returns:
        paths, in the model's order.

    Raises:
        UnknownNameError: a name that selects nothing.
        UnsupportedModuleError: a module that cannot be trained whole.
    """
    modules = {path: module for path, module in sites.base_modules(model) if path}
    for name in names:
        if not any(sites.matches(name, path) for path in modules):
            known = {path.rsplit(".", 1)[-1] for path in modules} | set(modules)
            raise UnknownNameError(
                f"modules_to_save: {name!r} matches no module of the model. {nearest(name, known)}"
            )
    chosen = [path for path in modules if any(sites.matches(name, path) for name in names)]
    for path in chosen:
        inside = next((other for other in chosen if other.startswith(path + ".")), None)
        if inside is not None:
            raise ConfigError(f"modules_to_save: {inside!r} lies in {path!r}. Name one of them.")
        _check_saved(path, modules[path])
    return chosen


def modules(
    model: nn.Module, names: Sequence[str], paths: Sequence[str]
) -> dict[str, dict[str, Trained]]:
    """The modules of `modules_to_save` at their start.

    Args:
        model: read only.
        names: patterns.
        paths: of the sites.

    Returns:
        module path -> parameter name -> parameter.

    Raises:
        ConfigError: a module that holds a site, and the errors of `saved_modules`.
    """
    found = {}
    for path in saved_modules(model, names):
        site = next((s for s in paths if s == path or s.startswith(path + ".")), None)
        if site is not None:
            raise ConfigError(
                f"modules_to_save: {path!r} holds the site {site!r}, and would be changed twice. "
                f"Add exclude_modules=[{site!r}], or leave it out of modules_to_save."
            )
        named = model.get_submodule(path).named_parameters()
        own = [(name, p) for name, p in named if f".{CHILD}." not in f".{name}"]
        found[path] = {name: start(f"{path}.{name}", parameter) for name, parameter in own}
    return found


def mistaken(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """Modules that software which compares the ends of paths takes for one trained whole.

    Args:
        model: read only.
        saved: paths of the modules trained whole.

    Returns:
        paths ("prenorm" beside "norm").
    """
    paths = [path for path, _ in sites.base_modules(model) if path not in saved]
    return [path for path in paths if any(path.endswith(name) for name in saved)]


def row_lengths(matrix: Tensor) -> Trained:
    """DoRA's magnitude at its start: the lengths of the rows of a weight.

    Args:
        matrix: (out, in) view.

    Returns:
        displacement zero on the lengths (out,), computed in float64, float32 on the CPU.
    """
    lengths = torch.linalg.vector_norm(matrix.detach(), dim=1, dtype=torch.float64)
    anchor = lengths.float().cpu()
    return Trained(torch.zeros_like(anchor), anchor)


def bind(name: str, value: Trained, base: Trained, verify: bool) -> Trained:
    """A value against the base it is attached to: with an anchor, and checked.

    Args:
        name: of the parameter.
        value: with or without an anchor.
        base: the base's own, at its start.
        verify: whether a differing anchor is an error.

    Returns:
        the value, its anchor the base's own where it had none.

    Raises:
        ShapeMismatchError: the base's has another shape.
        BaseMismatchError: the base's values are not the anchor.
    """
    assert base.anchor is not None
    here, wanted = tuple(base.anchor.shape), tuple(value.trainable.shape)
    if here != wanted:
        raise ShapeMismatchError(
            f"{name}: the base's is {here}, the adapter's {wanted}. Load the base model that the "
            "adapter was made on."
        )
    if value.anchor is None:
        return Trained(value.trainable - base.anchor, base.anchor)
    if not verify:
        # On another base the displacement is taken from that base, as the factors' is.
        close = torch.allclose(value.anchor, base.anchor.to(value.anchor), rtol=2**-8, atol=0)
        return value if close else Trained(value.trainable, base.anchor)
    if not _same(value.anchor, base.anchor):
        distance = float((value.anchor - base.anchor).abs().max())
        raise BaseMismatchError(
            f"{name}: the base's values differ by up to {distance:.3g} from those that the adapter "
            "was made on. Load that base model, or insist with verify=False (--no-verify)."
        )
    return value


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, or the same checkpoint in another precision: one is the other rounded."""
    if torch.equal(one.double(), other.double()):
        return True
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [one.to(dtype), other.to(dtype)]
        exact = any(
            torch.equal(r.double(), t.double()) for r, t in zip(rounded, (one, other), strict=True)
        )
        if exact and torch.equal(*rounded):
            return True
    return False


def _check_saved(path: str, module: nn.Module) -> None:
    buffers = [name for name, _ in module.named_buffers() if f".{CHILD}." not in f".{name}"]
    if buffers:
        raise UnsupportedModuleError(
            f"modules_to_save: {path!r} holds the buffer {buffers[0]!r}, which is no parameter and "
            "would be shared with the base. Name the parts without one."
        )
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or not list(module.parameters()):
        raise UnsupportedModuleError(
            f"modules_to_save: {path!r} ({type(module).__name__}) has no parameters or is never "
            "called itself. Name the modules in it."
        )
