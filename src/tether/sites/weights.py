"""The weight of a site: how a module stores it, and whether it can be read."""

from torch import Tensor, nn

from tether import quantized
from tether.errors import (
    MergedError,
    MetaTensorError,
    ShardedWeightError,
    UnsupportedModuleError,
)
from tether.quantized import Quantized
from tether.sites.paths import base_modules
from tether.value import KEPT, Layout


def layout_of(path: str, module: nn.Module) -> Layout:
    """How a module stores its weight.

    Args:
        path: for the message.
        module: Linear, transformers' Conv1D, Embedding, Conv1d, Conv2d or Conv3d.

    Returns:
        its layout.

    Raises:
        UnsupportedModuleError: any other module, or one of these in a form that cannot be adapted.
    """
    quantized.check_layer(f"site {path!r}", module)
    if isinstance(module, nn.Linear):
        # Not the weight's shape: quantised layers pack it.
        return Layout("linear", (module.out_features, module.in_features))
    if is_conv1d(module):
        return Layout("transposed", tuple(_weight(path, module).shape))
    if isinstance(module, nn.Embedding):
        _check_embedding(path, module)
        return Layout("embedding", (module.num_embeddings, module.embedding_dim))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1:
            raise UnsupportedModuleError(
                f"site {path!r}: a convolution with groups {module.groups}; only groups 1 has one "
                "(out, in) matrix. Exclude it with exclude_modules."
            )
        common = module.padding_mode == "zeros" and all(d == 1 for d in module.dilation)
        return Layout("conv", tuple(module.weight.shape), common)
    raise UnsupportedModuleError(
        f"site {path!r}: {type(module).__name__} cannot carry an adapter. Name its Linear, Conv1D, "
        "Embedding or Conv1d/2d/3d parts instead."
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told without importing transformers.

    Args:
        module: any.

    Returns:
        True if it is.
    """
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def stored_weight(path: str, module: nn.Module) -> Tensor | Quantized:
    """The weight of a site as the base holds it, quantised or not. Not a copy.

    Args:
        path: for the message.
        module: a module that `layout_of` accepts.

    Returns:
        the weight itself, or what a quantised one holds.

    Raises:
        MetaTensorError: it has no values.
        ShardedWeightError: it is a DTensor.
        UnsupportedModuleError: it is quantised in a way that is not known.
    """
    weight = _weight(path, module)
    label = f"site {path!r}: weight"
    _check_here(label, weight)
    found = quantized.read(label, weight, module)
    return weight if found is None else found


def base_weight(path: str, module: nn.Module) -> Tensor:
    """The floating-point weight of a site, checked to be readable. Not a copy.

    Args:
        path: for the message.
        module: a module that `layout_of` accepts.

    Returns:
        the weight as stored.

    Raises:
        MetaTensorError: it has no values.
        ShardedWeightError: it is a DTensor.
        UnsupportedModuleError: it is not floating point (quantised).
    """
    weight = _weight(path, module)
    check_readable(f"site {path!r}: weight", weight, module)
    return weight


def check_readable(label: str, tensor: Tensor, module: nn.Module) -> None:
    """Raise unless a parameter of the base has values that can be read.

    Args:
        label: what to call it in the message.
        tensor: the parameter.
        module: that holds it.

    Raises:
        MetaTensorError: it has no values.
        ShardedWeightError: it is a DTensor.
        UnsupportedModuleError: it is not floating point (quantised).
    """
    _check_here(label, tensor)
    found = quantized.read(label, tensor, module)
    if found is not None:
        raise UnsupportedModuleError(
            f"{label} in {type(module).__name__} is quantised ({found.kind}), and this needs a "
            "floating-point weight. Load the base unquantised, or exclude the module."
        )


def check_unmerged(model: nn.Module) -> None:
    """Raise where the weights are not the base's own: an adapter is merged into them.

    Args:
        model: any module.

    Raises:
        MergedError: naming the first such weight.
    """
    for path, module in base_modules(model):
        for name in module._buffers:
            if name.startswith(KEPT):
                raise MergedError(
                    f"{path}.{name.removeprefix(KEPT)}: an adapter is merged into this weight, so "
                    "another can neither start from it nor be attached. Un-merge it first, with "
                    "tether.unmerge, outside of every block such as tether.reference."
                )


def _check_here(label: str, tensor: Tensor) -> None:
    """The tensor has values, all of them on this process."""
    if tensor.is_meta:
        raise MetaTensorError(
            f"{label} {tuple(tensor.shape)} is on the meta device, without values. "
            "Load the model with its weights first, or give tether.init its folder: weights_from=."
        )
    if any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
        raise ShardedWeightError(
            f"{label} {tuple(tensor.shape)} is a DTensor. "
            "Attach before fully_shard, then shard the model with its adapter."
        )


def _weight(path: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModuleError(
            f"site {path!r}: {type(module).__name__} has no weight tensor. Exclude it."
        )
    return weight


def _check_embedding(path: str, module: nn.Embedding) -> None:
    if module.max_norm is not None:
        raise UnsupportedModuleError(
            f"site {path!r}: an Embedding with max_norm {module.max_norm} rewrites its own weight "
            "in every forward. Exclude it, or set max_norm to None."
        )
    custom = type(module).forward is not nn.Embedding.forward
    if custom and not hasattr(module, "embed_scale"):
        raise UnsupportedModuleError(
            f"site {path!r}: {type(module).__name__} changes what nn.Embedding computes in a way "
            "tether does not know. Exclude it."
        )
