"""Which weights an adapter changes: names, globs, all-linear -> sites and their matrix views."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tether import quantized
from tether.errors import (
    MergedError,
    MetaTensorError,
    NoSiteError,
    ShardedWeightError,
    UnknownNameError,
    UnsupportedModuleError,
    nearest,
)
from tether.quantized import Quantized
from tether.value import CHILD, KEPT, Layout

ALL_LINEAR = "all-linear"
# Heads that classification and other models of transformers put on top.
_HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")


@dataclass(frozen=True, slots=True)
class Site:
    """One weight an adapter can change.

    Attributes:
        path: of the module in the model.
        layout: how its weight is stored.
    """

    path: str
    layout: Layout


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern selects a module path.

    Args:
        pattern: a whole path; one or more of its last components ("q_proj", "self_attn.q_proj");
            or, if it contains any of *?[, a glob over the whole path.
        path: of a module.

    Returns:
        True if it does.
    """
    if any(c in pattern for c in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def find(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[Site]:
    """The sites of a model that the patterns select, in the model's order.

    Args:
        model: read only.
        targets: patterns as of `matches`, or "all-linear": every Linear and Conv1D but the output
            head.
        exclude: patterns to leave out.
        layers: indices to keep: the first number in a path ("model.layers.3.mlp" is 3).

    Returns:
        at least one site.

    Raises:
        UnknownNameError: a pattern, or a layer index, that selects nothing.
        NoSiteError: nothing is left.
        UnsupportedModuleError: a selected module that cannot carry an adapter.
    """
    modules = {path: module for path, module in base_modules(model) if path}
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    candidates = _all_linear(model, modules) if ALL_LINEAR in patterns else []
    named = [p for p in patterns if p != ALL_LINEAR]
    _check_patterns(named, modules, "target_modules")
    _check_patterns(exclude, modules, "exclude_modules")
    _check_layers(layers, modules)
    chosen = set(candidates)
    chosen.update(path for path in modules if any(matches(p, path) for p in named))
    kept = [
        path
        for path in modules
        if path in chosen
        and not any(matches(p, path) for p in exclude)
        and (layers is None or layer_index(path) in layers)
    ]
    if not kept:
        raise NoSiteError(
            f"target_modules {list(patterns)} without exclude_modules {list(exclude)}"
            + (f" in layers {list(layers)}" if layers is not None else "")
            + " select no weight of the model. Widen the targets, or drop an exclusion."
        )
    sites = [Site(path, layout_of(path, modules[path])) for path in kept]
    _refuse_uncalled(modules, kept)
    return sites


def layer_index(path: str) -> int | None:
    """The first component of a path that is a number: the index of the layer it lies in.

    Args:
        path: of a module.

    Returns:
        the index, or None if the path has none.
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


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


def short_targets(
    model: nn.Module, paths: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The shortest names that select these paths among all modules.

    Args:
        model: the model that holds them.
        paths: of its sites.

    Returns:
        names: last components where every module so named is a site, whole paths otherwise; and
        the paths that these names select besides ("block.proj" ends in the whole path "proj").
        Both sorted.
    """
    wanted = set(paths)
    # The last components of modules that are no sites: such a name would select too much.
    others = {p for p, _ in base_modules(model) if p not in wanted}
    taken = {p.rsplit(".", 1)[-1] for p in others}
    names: set[str] = set()
    for path in paths:
        last = path.rsplit(".", 1)[-1]
        names.add(path if last.isdigit() or last in taken else last)
    besides = {p for p in others if not names.isdisjoint(_endings(p))}
    return tuple(sorted(names)), tuple(sorted(besides))


def _endings(path: str) -> list[str]:
    """The path and what is left of it without its first components: what can select it."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without the adapters that hang on them.

    Args:
        model: any module.

    Yields:
        (path, module), in the model's order; shared modules once.
    """
    stack = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = path + "." if path else ""
        children = [(prefix + n, c) for n, c in module.named_children() if n != CHILD]
        stack.extend(reversed(children))


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        path
        for path, module in modules.items()
        # A quantised one that is not known is no nn.Linear, and not to be passed over: refused.
        if (isinstance(module, nn.Linear) or is_conv1d(module) or quantized.is_linear(module))
        and module is not output
        and not any(part in _HEADS for part in path.split(".")[:2])
    ]


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


def _check_patterns(patterns: Sequence[str], modules: dict[str, nn.Module], field: str) -> None:
    for pattern in patterns:
        if not any(matches(pattern, path) for path in modules):
            leaves = {path.rsplit(".", 1)[-1] for path in modules} | {ALL_LINEAR}
            names = {n for n in leaves if not n.isdigit()} | set(modules)
            raise UnknownNameError(
                f"{field}: {pattern!r} matches no module of the model. {nearest(pattern, names)}"
            )


def _check_layers(layers: Sequence[int] | None, modules: dict[str, nn.Module]) -> None:
    known = {layer_index(path) for path in modules} - {None}
    for index in layers or ():
        if index not in known:
            there = f"0 to {max(i for i in known if i is not None)}" if known else "not numbered"
            raise UnknownNameError(
                f"layers_to_transform: there is no layer {index}; the model's layers are {there}."
            )


def _refuse_uncalled(modules: dict[str, nn.Module], paths: Sequence[str]) -> None:
    """MultiheadAttention reads the weight of its out_proj and never calls it."""
    for path in paths:
        parent = modules.get(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise UnsupportedModuleError(
                f"site {path!r}: MultiheadAttention never calls this module, so an adapter on it "
                f"would have no effect. Add exclude_modules=[{path!r}]."
            )
