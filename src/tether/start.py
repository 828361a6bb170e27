"""init: a model and a configuration -> an adapter. Reads the base, changes nothing."""

import hashlib
from importlib.metadata import version

import torch
from torch import nn

from tether import linalg, sites, whole
from tether.config import LoraConfig, Plan, plan
from tether.errors import ShapeMismatchError, TetherError
from tether.fingerprints import fingerprint_tensor
from tether.methods import Context, Method
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Factors, LayerAdapter, Progress


@torch.no_grad()
def init(
    model: nn.Module, config: LoraConfig | None = None, *, progress: Progress | None = None
) -> Adapter:
    """Choose the start of an adapter. Pure: the model is read, never changed.

    Args:
        model: any module whose selected weights are floating point.
        config: what to adapt and how; None for PiSSA of rank 16 on all linear layers.
        progress: called with (sites done, sites in all) after each site.

    Returns:
        the adapter at its start, ΔW = 0: displacement zero on an anchor, or B·A = 0; biases,
        magnitudes and whole modules at the base's own values. float32 on the CPU. Same seed, same
        bits.

    Raises:
        ConfigError: the configuration does not fit the model.
        WeightError: a selected weight is NaN, Inf, without values, or sharded.
        MergedError: an adapter is merged into the model.
    """
    config = config or LoraConfig()
    model = original(model)
    sites.check_unmerged(model)
    method = config.method
    layers: dict[str, LayerAdapter] = {}
    prints: dict[str, Fingerprint] = {}
    plans = plan(model, config)
    for done, item in enumerate(plans, start=1):
        layers[item.site.path], prints[item.site.path] = _start_site(model, item, config, method)
        if progress is not None:
            progress(done, len(plans))
    modules = whole.modules(model, config.modules_to_save, list(layers))
    targets, excluded = sites.short_targets(model, list(layers))
    excluded = tuple(sorted({*excluded, *whole.mistaken(model, list(modules))}))
    return Adapter(
        layers=layers,
        provenance=Provenance(
            method=method.name,
            seed=config.seed,
            tether_version=version("tether"),
            base_model=base_name(model),
            base_class=base_class(model),
            fingerprints=prints,
        ),
        config=config.to_dict(),
        targets=targets,
        excluded=excluded,
        biases=whole.biases(model, config.bias, list(layers), list(modules)),
        modules=modules,
    )


def original(model: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself.

    Args:
        model: wrapped or not.

    Returns:
        the module whose paths are the user's own.
    """
    inner = model._modules.get("_orig_mod")
    return inner if inner is not None else model


def base_name(model: nn.Module) -> str | None:
    """The name or path a transformers model was loaded from.

    Args:
        model: any module.

    Returns:
        the name, or None if the model does not know.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def base_class(model: nn.Module) -> str | None:
    """The class of a transformers model, by which others load it.

    Args:
        model: any module.

    Returns:
        "transformers.….LlamaForCausalLM", or None for a model of another library.
    """
    cls = type(model)
    full = f"{cls.__module__}.{cls.__qualname__}"
    return full if full.startswith("transformers.") else None


def _start_site(
    model: nn.Module, item: Plan, config: LoraConfig, method: Method
) -> tuple[LayerAdapter, Fingerprint]:
    path, layout = item.site.path, item.site.layout
    weight = sites.base_weight(path, model.get_submodule(path)).detach()
    linalg.check_finite(weight, f"site {path!r}: weight {tuple(weight.shape)}")
    generator = torch.Generator().manual_seed(seed_for(config.seed, path))
    matrix = layout.matrix(weight).float()
    try:
        factors = method.start(matrix, item.rank, Context(path, item.scaling, generator))
    except TetherError as error:
        raise type(error)(f"site {path!r}: {error}") from error
    if (factors.rank, factors.shape) != (item.rank, tuple(matrix.shape)):
        raise ShapeMismatchError(
            f"site {path!r}: method {method.name!r} gave factors of rank {factors.rank} for a "
            f"matrix {factors.shape}; wanted rank {item.rank} for {tuple(matrix.shape)}."
        )
    factors = Factors(factors.A.cpu().contiguous(), factors.B.cpu().contiguous())
    for name, factor in (("A", factors.A), ("B", factors.B)):
        linalg.check_finite(factor, f"site {path!r}: factor {name} of method {method.name!r}")
    anchor = factors if method.lifts else None
    trainable = factors.zeros_like() if method.lifts else factors
    magnitude = whole.row_lengths(layout.matrix(weight)) if config.use_dora else None
    layer = LayerAdapter(trainable, anchor, item.scaling, layout, float(config.dropout), magnitude)
    return layer, fingerprint_tensor(weight)


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
