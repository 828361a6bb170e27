"""Which weights an adapter changes: names, globs, all-linear -> sites."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tether import quantized
from tether.errors import NoSiteError, UnknownNameError, UnsupportedModuleError, nearest
from tether.sites.paths import base_modules, layer_index, matches
from tether.sites.weights import is_conv1d, layout_of
from tether.value import Layout

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
