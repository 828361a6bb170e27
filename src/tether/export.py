"""save_as_lora: any adapter, live or not, as the plain LoRA folder that other software reads."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tether import algebra, fs, saving
from tether import verify as verifying
from tether.config import AFTER
from tether.conversion import ConversionReport, SiteReport, Verification, error_curve
from tether.errors import ConfigError, MergedError, NonFiniteError, ShardedWeightError
from tether.formats import peft_names, peft_write
from tether.handle import Handle
from tether.source import Source, of_adapter, sketch
from tether.stream import TensorWriter
from tether.value import Adapter, LayerAdapter, Progress, Trained

# How to read live models of other libraries; integrations add theirs.
readers: list[Callable[[object], Adapter | None]] = []


def save_as_lora(
    source: object,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    after: str | None = None,
    offload_to: str | os.PathLike[str] = "cpu",
    verify: Any = None,
    verify_tolerance: float | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a plain LoRA for the unchanged base, as a PEFT folder.

    Everything the adapter changes is written: factors of every kind of site, DoRA magnitudes,
    trained biases, modules trained whole; what PEFT cannot express is refused by name. A live
    model is only looked at: weights, gradients, modes, requires_grad and random state stay as they
    are. Site by site: the extra memory is about that of one site. Of an adapter that fully_shard
    sharded all ranks must call it: rank 0 gathers it whole in CPU memory and writes.

    Args:
        source: a handle, an adapter, a `Source`, or a live model of peft.
        path: of the folder. An older adapter there is replaced in one step; a folder that holds
            other files is refused.
        rank: largest rank of any site; None for no limit (2r for an anchored adapter).
        tolerance: largest relative error of any site's ΔW from reducing its rank.
        dtype: of the file: float32 (None), bfloat16 or float16. DoRA magnitudes stay float32.
        after: what becomes of the live adapter once the file is in place: "keep" leaves it bitwise
            as it is, "offload" takes its factors off the model (see `Handle.offload`), "detach"
            takes it off, after which the model is the base. None for the adapter's own setting
            (`LoraConfig.after_save`), which is "keep" unless said otherwise.
        offload_to: "cpu", or the native file to keep an offloaded adapter in.
        verify: a batch (a mapping of the model's inputs, or its one input) on which the logits of
            the live model are compared with those of base + file before it is published.
        verify_tolerance: largest relative error of those logits; None as of `tether.verify`.
        progress: called with (sites measured, sites in all).

    Returns:
        the measured report.

    Raises:
        ConfigError: a setting cannot be meant, or needs a live adapter.
        UnsupportedAdapterError: something that PEFT cannot express, by name.
        NonFiniteError: a value is NaN or Inf, or does not fit `dtype`.
        VerificationError: the logits differ by more than the tolerance.
        ShardedWeightError: the adapter is sharded, with `verify` or after="offload".
        DistributedError: it is sharded, and rank 0 could not write it; on the other ranks.
        WriteError: it cannot be written. After any error, what was there stays.
    """
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in peft_write.DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(peft_write.DTYPES.values())}.")
    reader = _reader(source)
    handle = source if isinstance(source, Handle) else None
    after = _after(reader.about, handle, after)
    if verify is not None and handle is None:
        raise ConfigError("verify needs a live adapter to compare with: give a handle.")
    if handle is not None and saving.sharded(handle.model, handle.name):
        settings = {"rank": rank, "tolerance": tolerance, "dtype": dtype, "progress": progress}
        return _save_sharded(handle, path, after, verify, settings)
    peft_write.check_expressible(reader.about)
    job = _Job(reader, rank, tolerance, dtype)
    sites, spectra = job.measure(progress)
    wholes = job.measure_wholes()
    checked: Verification | None = None
    with fs.atomic_directory(path, peft_names.FILES) as folder:
        job.write(folder, {site: report.rank for site, report in sites.items()})
        if handle is not None and verify is not None:
            reduced = rank is not None or tolerance is not None
            checked = verifying.check(handle, folder, verify, dtype, verify_tolerance, reduced)
    if handle is not None and after == "offload":
        handle.offload(offload_to)
    if handle is not None and after == "detach":
        handle.detach()
    origin = reader.about.provenance
    return ConversionReport(
        path=Path(path),
        dtype=peft_write.DTYPES[dtype],
        rank=max(report.rank for report in sites.values()),
        sites=sites,
        curve=error_curve(spectra),
        wholes=wholes,
        verification=checked,
        after=after,
        quantization=origin.quantization,
        gaps=dict(origin.gaps),
    )


def _save_sharded(
    handle: Handle,
    path: str | os.PathLike[str],
    after: str,
    verify: Any,
    settings: Mapping[str, Any],
) -> ConversionReport:
    """Gathered by all ranks, written by rank 0."""
    asked = {"after='offload'": after == "offload", "verify": verify is not None}
    for name in (name for name, wanted in asked.items() if wanted):
        raise ShardedWeightError(
            f"{name}: adapter {handle.name!r} is sharded by fully_shard, which neither gives its "
            "memory up nor takes a second adapter to compare with. Leave it out; to verify, save "
            "the native file too, attach it in one process, and save from there."
        )
    adapter = saving.gather(handle.model, handle.name)
    report = saving.written(lambda: save_as_lora(adapter, path, **settings))
    if after == "detach":
        handle.detach()
    return replace(report, after=after)


def _reader(source: object) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, Handle):
        return source.source()
    if isinstance(source, Adapter):
        return of_adapter(source)
    for read in readers:
        adapter = read(source)
        if adapter is not None:
            return of_adapter(adapter)
    raise ConfigError(
        f"{type(source).__name__} is no adapter. Give a handle (tether.handles(model)), an adapter "
        "(tether.load), or a model of peft with a LoRA."
    )


def _after(about: Adapter, handle: Handle | None, after: str | None) -> str:
    """What becomes of the live adapter."""
    if handle is None:
        if after not in (None, "keep"):
            raise ConfigError(f"after={after!r} needs a live adapter of tether's: give a handle.")
        return "keep"
    wanted = about.config.get("after_save", "keep") if after is None else after
    if wanted == "offload" and handle.merged:
        raise MergedError(
            f"adapter {handle.name!r} is merged into the base and cannot be offloaded. Call "
            f"tether.unmerge(model, {handle.name!r}) first, or save with after='keep'."
        )
    if wanted not in AFTER:
        raise ConfigError(f"after must be one of {', '.join(AFTER)}, not {wanted!r}.")
    return str(wanted)


class _Job:
    """One export: the source, and what was asked for."""

    def __init__(
        self, source: Source, rank: int | None, tolerance: float | None, dtype: torch.dtype
    ) -> None:
        self.source, self.rank, self.tolerance, self.dtype = source, rank, tolerance, dtype

    def measure(
        self, progress: Progress | None
    ) -> tuple[dict[str, SiteReport], dict[str, list[float]]]:
        """Every site's report, and the singular values of its change."""
        reports: dict[str, SiteReport] = {}
        spectra: dict[str, list[float]] = {}
        for done, site in enumerate(self.source.about.layers, start=1):
            layer = self.source.layer(site)
            plain = self.plain(site, layer)
            written = peft_write.canonical_layer(site, plain, plain.rank, self.dtype)
            error = algebra.relative_error(layer, written)
            reports[site] = SiteReport(plain.rank, algebra.norm(layer), error)
            spectra[site] = algebra.singular_values(layer).tolist()
            if progress is not None:
                progress(done, len(self.source.about.layers))
        return reports, spectra

    def plain(self, site: str, layer: LayerAdapter) -> LayerAdapter:
        """A site's plain form, of smaller rank if asked."""
        try:
            return algebra.compress(layer, self.rank, self.tolerance).layer
        except (ConfigError, NonFiniteError) as error:
            raise type(error)(f"site {site!r}: {error}") from None

    def measure_wholes(self) -> dict[str, float]:
        """The relative error of every displacement that is written whole."""
        return {name: _whole_error(name, value, self.dtype) for name, _, value in self._wholes()}

    def write(self, folder: Path, ranks: Mapping[str, int]) -> None:
        """Write the folder's files, one site at a time."""
        about = self.source.about
        rank = max(ranks.values())
        plain = replace(
            about, layers={site: sketch(layer, rank) for site, layer in about.layers.items()}
        )
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for site, layer in plain.layers.items():
            for key, tensor in peft_write.layer_tensors(site, layer).items():
                whole = key.endswith(peft_names.MAGNITUDE)
                specs[key] = (torch.float32 if whole else self.dtype, tuple(tensor.shape))
        for key, value in peft_write.whole_keys(about):
            specs[key] = (self.dtype, tuple(value.trainable.shape))
        with TensorWriter(folder / peft_names.WEIGHTS, specs, 64) as writer:
            for site in about.layers:
                layer = self.plain(site, self.source.layer(site))
                layer = peft_write.canonical_layer(site, layer, rank, self.dtype)
                for key, tensor in peft_write.layer_tensors(site, layer).items():
                    writer.write(key, tensor)
            for name, key, value in self._wholes():
                writer.write(key, peft_write.whole_tensor(name, value, self.dtype))
            writer.finish({"format": "pt"})
        peft_write.write_description(folder, plain, self.dtype)

    def _wholes(self) -> Iterator[tuple[str, str, Trained]]:
        """(name, key, value) of everything trained whole, one at a time."""
        about = self.source.about
        for path in about.biases:
            yield f"{path}.bias", peft_write.bias_key(about, path), self.source.bias(path)
        for path, state in about.modules.items():
            for name in state:
                key = peft_write.module_key(path, name)
                yield f"{path}.{name}", key, self.source.module(path, name)


def _whole_error(name: str, value: Trained, dtype: torch.dtype) -> float:
    """|d − d'|_F / |d|_F of a displacement (of the value itself where there is no anchor)."""
    written = peft_write.whole_tensor(name, value, dtype).double()
    exact = value.trainable.double()
    if value.anchor is not None:
        written = written - value.anchor.double()
    size, apart = (float(torch.linalg.vector_norm(t)) for t in (exact, exact - written))
    return apart / size if size > 0 else 0.0
