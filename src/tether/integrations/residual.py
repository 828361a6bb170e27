"""QPiSSA: a quantised residual base, and the factors that complete it, as a folder of their own.

Source: Meng, Wang, Zhang 2024, arXiv:2404.02948, section 3.2; with several rounds the alternation
of LoftQ, Li et al. 2023, arXiv:2310.08659, algorithm 1, begun at PiSSA's start.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether import formats, fs, quantized, sites
from tether.checkpoint import Checkpoint
from tether.config import LoraConfig
from tether.errors import ConfigError, MissingExtraError, UnsupportedModuleError
from tether.integrations import hub
from tether.merged import folder as folders
from tether.merged import save_merged
from tether.methods import Context
from tether.quantized import Quantized
from tether.start import Search, find
from tether.start.site import seed_for
from tether.value import Adapter, Factors, Json, LayerAdapter, Progress

ADAPTER = "adapter.safetensors"
KINDS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True, slots=True)
class SiteError:
    """How far a site is from its weight W before training.

    Attributes:
        plain: |W − Q(W)|, the nuclear norm: of the base quantised as it is.
        residual: |W − (Q(W − s·B·A) + s·B·A)|: of what was written.
    """

    plain: float
    residual: float


@dataclass(frozen=True, slots=True)
class ResidualReport:
    """What `save_residual` wrote.

    Attributes:
        path: of the folder.
        quantization: how the base in it is quantised.
        sites: site path -> errors.
    """

    path: Path
    quantization: tuple[str, ...]
    sites: Mapping[str, SiteError]

    @property
    def reduction(self) -> float:
        """1 − Σ residual / Σ plain: the share of quantisation's error that is gone."""
        plain = sum(site.plain for site in self.sites.values())
        return 1 - sum(site.residual for site in self.sites.values()) / plain if plain else 0.0

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            its fields, and the reduction.
        """
        return {
            "path": str(self.path),
            "quantization": list(self.quantization),
            "reduction": self.reduction,
            "sites": {
                path: {"plain": site.plain, "residual": site.residual}
                for path, site in self.sites.items()
            },
        }


@torch.no_grad()
def save_residual(
    base: str,
    path: str | os.PathLike[str],
    config: LoraConfig | None = None,
    *,
    quantize: str = "nf4",
    rounds: int = 1,
    progress: Progress | None = None,
) -> ResidualReport:
    """Write W − s·B·A, quantised, as a model folder, and A and B as an adapter that belongs to it.

    An explicit operation on checkpoints: the folder is another base than `base`, which is only
    read. The adapter in it has no anchor: on this base it *is* the change, and is trained directly.

    Args:
        base: folder or hub id of the unquantised model.
        path: of the folder to write: new, or empty.
        config: method, rank and sites; None for PiSSA of rank 16 on all linear layers.
        quantize: "nf4", "fp4" or "int8", of bitsandbytes, by transformers.
        rounds: 1 for QPiSSA; in each further one A and B are taken anew, from what quantising the
            residual has lost.
        progress: called with (sites measured, sites in all).

    Returns:
        the measured report.

    Raises:
        ConfigError: no such quantisation; a method without an anchor; DoRA.
        MissingExtraError: bitsandbytes is not installed.
        UnsupportedModuleError: a site that transformers leaves unquantised.
        WriteError: it cannot be written; what was there stays.
    """
    config = config or LoraConfig()
    _check(config, quantize, rounds)
    source, target = Path(hub.fetch(base)), Path(path)
    folders.check_outside(target, source, "base model")
    folders.check_free(target)
    checkpoint = Checkpoint.open(source)
    adapter = find(hub.skeleton(str(source)), config, Search(source)).adapter
    factors = {
        path: _factors(path, layer, _matrix(checkpoint, path, layer), config, quantize, rounds)
        for path, layer in adapter.layers.items()
    }
    with fs.atomic_directory(target, ()) as temporary:
        scratch = temporary / "residual"
        save_merged(checkpoint, _taken(adapter, factors), scratch)
        model = _load(scratch, quantize)
        shutil.rmtree(scratch)
        transformers = hub.import_transformers()
        with hub.quietly(transformers):
            model.save_pretrained(temporary)
        for name in folders.beside_weights(source)[0]:
            if not (temporary / name).exists():
                fs.copy_file(source / name, temporary / name)
        value = _completing(adapter, factors, model, target)
        formats.save(value, temporary / ADAPTER)
        errors = _errors(checkpoint, value, model, quantize, progress)
    return ResidualReport(target, value.provenance.quantization, errors)


def _check(config: LoraConfig, quantize: str, rounds: int) -> None:
    if quantize not in KINDS:
        raise ConfigError(f"quantize: {quantize!r} is none of {', '.join(KINDS)}.")
    if (
        not config.method.lifts
        or config.use_dora
        or config.bias != "none"
        or config.modules_to_save
    ):
        raise ConfigError(
            f"a residual base needs a method that takes a part of W, not {config.method.name!r}, "
            "and no DoRA, bias or modules_to_save."
        )
    if rounds != 1 and config.method.name != "pissa":
        raise ConfigError(f"rounds={rounds!r} needs PiSSA, not {config.method.name!r}.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds must be a whole number, at least 1, not {rounds!r}.")


def _load(folder: Path, quantize: str) -> Any:
    transformers = hub.import_transformers()
    try:
        settings = transformers.BitsAndBytesConfig(**KINDS[quantize])
        with hub.quietly(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=settings,
                device_map="cpu",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except ImportError as error:
        raise MissingExtraError(
            f"quantising needs bitsandbytes and accelerate: pip install bitsandbytes. ({error})"
        ) from error
    return model.eval()


def _matrix(checkpoint: Checkpoint, path: str, layer: LayerAdapter) -> Tensor:
    return layer.layout.matrix(checkpoint.tensor(checkpoint.weight_name(path))).float()


def _quantised(matrix: Tensor, quantize: str) -> Tensor:
    """A matrix as quantising it by itself leaves it."""
    # By name: only this operation makes quantised weights.
    library = import_module("bitsandbytes.nn")
    if quantize == "int8":
        weight = library.Int8Params(matrix.clone(), requires_grad=False).to("cpu")
    else:
        weight = library.Params4bit(
            matrix.clone(), requires_grad=False, quant_type=quantize, compress_statistics=False
        ).to("cpu")
    found = quantized.read("a residual", weight)
    assert found is not None
    return found.dequantize()


def _factors(
    path: str,
    layer: LayerAdapter,
    matrix: Tensor,
    config: LoraConfig,
    quantize: str,
    rounds: int,
) -> Factors:
    assert layer.anchor is not None
    factors, scaling = layer.anchor, layer.scaling
    generator = torch.Generator().manual_seed(seed_for(config.seed, path))
    context = Context(path, scaling, generator, lambda _: None)
    for _ in range(rounds - 1):
        held = _quantised(matrix - scaling * (factors.B @ factors.A), quantize)
        factors = config.method.start(matrix - held, layer.rank, context)
    return factors


def _taken(adapter: Adapter, factors: Mapping[str, Factors]) -> Adapter:
    """The change from W to W − s·B·A."""
    layers = {
        path: replace(layer, trainable=Factors(factors[path].A, -factors[path].B), anchor=None)
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def _completing(
    adapter: Adapter, factors: Mapping[str, Factors], model: nn.Module, target: Path
) -> Adapter:
    """A and B as an adapter of the quantised base."""
    layers, prints = {}, {}
    for path, layer in adapter.layers.items():
        layers[path] = replace(layer, trainable=factors[path], anchor=None)
        prints[path] = _held(model, path).fingerprint()
    origin = replace(
        adapter.provenance, fingerprints=prints, certificates={}, base_model=str(target)
    )
    return replace(adapter, layers=layers, provenance=origin)


def _errors(
    checkpoint: Checkpoint,
    adapter: Adapter,
    model: nn.Module,
    quantize: str,
    progress: Progress | None,
) -> dict[str, SiteError]:
    found = {}
    for done, (path, layer) in enumerate(adapter.layers.items(), start=1):
        matrix = _matrix(checkpoint, path, layer)
        change = layer.scaling * (layer.trainable.B @ layer.trainable.A)
        errors = (
            matrix - _quantised(matrix, quantize),
            matrix - _held(model, path).dequantize() - change,
        )
        found[path] = SiteError(*(float(torch.linalg.svdvals(error).sum()) for error in errors))
        if progress is not None:
            progress(done, len(adapter.layers))
    return found


def _held(model: nn.Module, path: str) -> Quantized:
    stored = sites.stored_weight(path, model.get_submodule(path))
    if not isinstance(stored, Quantized):
        raise UnsupportedModuleError(
            f"site {path!r}: transformers leaves this module unquantised. Exclude it."
        )
    return stored
