"""A PEFT adapter on a residual model -> the same adapter, anchored, on the base; site by site."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tether import algebra
from tether.checkpoint import Checkpoint
from tether.errors import ConfigError, ConvergenceError, RescueError, UnsupportedAdapterError
from tether.fingerprints import fingerprint_tensor
from tether.formats.peft_residual import (
    PLAIN,
    RECOMPUTED,
    refuse_residual,
    residual_start,
    ways_to_rescue,
)
from tether.provenance import Fingerprint, Provenance
from tether.rescue.folder import PeftFolder
from tether.rescue.recompute import Recomputed
from tether.rescue.report import SiteRescue
from tether.rescue.sources import Found, Saved, Source, Subtracted, read_weight
from tether.value import Adapter, Factors, LayerAdapter

# Factors that have nothing to do with a start are at least its own size away from it (they are
# at right angles); training moves them by a few hundredths of it.
_STRANGE = 0.4
# The share of a trained factor inside its start's space, beyond what chance puts there.
_KIN = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class RescuedSite:
    """One site, anchored.

    Attributes:
        path: of the site.
        layer: float32; ΔW = s·(B·A − B0·A0) to float32 rounding of ΔW itself.
        report: how its anchor was found.
        fingerprint: of the base's weight, where there is a base.
    """

    path: str
    layer: LayerAdapter
    report: SiteRescue
    fingerprint: Fingerprint | None


@dataclass(frozen=True, slots=True)
class Rescue:
    """A rescue about to be done: all is checked that headers tell, nothing is computed yet.

    Attributes:
        folder: the trained adapter.
        source: of its initial factors.
        name: of the source: "anchor", "residual" or "base".
        method: the start that the file names, or "unknown".
        plain: sites that started as plain LoRA.
        inputs: what it is called -> a folder that is read.
    """

    folder: PeftFolder
    source: Source
    name: str
    method: str
    plain: frozenset[str]
    inputs: Mapping[str, Path]

    @property
    def shapes(self) -> Adapter:
        """The result without values: tensors on the meta device, no fingerprints."""
        layers = {
            path: layer if path in self.plain else replace(layer, anchor=layer.trainable)
            for path, layer in self.folder.shapes.layers.items()
        }
        origin = Provenance(self.method, base_model=self.folder.shapes.provenance.base_model)
        return replace(self.folder.shapes, layers=layers, provenance=origin)

    @torch.no_grad()
    def sites(self) -> Iterator[RescuedSite]:
        """Recover site by site; only one is in memory.

        Yields:
            the sites in the file's order.

        Raises:
            RescueError: a site's initial factors cannot be what was given.
        """
        for path in self.folder.shapes.layers:
            layer = self.folder.layer(path)
            if path in self.plain:
                yield self._plain(path, layer)
                continue
            try:
                found = self.source.find(path, layer)
            except ConvergenceError as error:
                raise RescueError(f"site {path!r}: {error}") from error
            yield self._anchored(path, layer, found)

    def _plain(self, path: str, layer: LayerAdapter) -> RescuedSite:
        assert isinstance(self.source, Recomputed)
        weight = read_weight(self.source.base, path, layer.layout)
        report = SiteRescue(layer.rank, algebra.norm(layer), 0.0, 0.0, None, 0.0)
        return RescuedSite(path, layer, report, fingerprint_tensor(weight))

    def _anchored(self, path: str, layer: LayerAdapter, found: Found) -> RescuedSite:
        trained, start = layer.trainable.to(torch.float64), found.anchor
        moved = Factors(trained.A - start.A, trained.B - start.B)
        # Both rounded by themselves: what float32 loses is relative to the displacement, and the
        # current factors keep their own precision.
        result = replace(layer, trainable=moved.to(torch.float32), anchor=start.to(torch.float32))
        change, size = algebra.norm(result), found.product.norm
        if size > 0:
            self._check_related(path, trained, found, change, layer.scaling)
        uncertainty = found.error / change if change > 0 else 0.0
        report = SiteRescue(layer.rank, change, size, found.left_over, found.gap, uncertainty)
        return RescuedSite(path, result, report, found.fingerprint)

    def _check_related(
        self, path: str, trained: Factors, found: Found, change: float, scaling: float
    ) -> None:
        part = found.product
        if self.name == "base":
            if change > _STRANGE * part.norm:
                raise RescueError(
                    f"site {path!r}: the start computed from the base has norm {part.norm:.3g} and "
                    f"the trained factors are {change:.3g} away from it: they did not start there. "
                    "Give the base that was trained on, or the adapter saved before training."
                )
            return
        # Training away from the start leaves this near |P|², or above −|P|²/2 at the least.
        along = float(((part.u.T @ trained.B) * (part.s[:, None] * (part.vt @ trained.A.T))).sum())
        if scaling * along < -(part.norm**2) / 2:
            raise RescueError(
                f"site {path!r}: the trained factors point against the {self.name}'s: base and "
                "residual model were swapped, or it belongs to another adapter."
            )
        shares = (_share(trained.A, part.vt), _share(trained.B.T, part.u.T))
        if max(shares) < _KIN:
            raise RescueError(
                f"site {path!r}: the trained factors lie in the space of the {self.name}'s factors "
                f"no more than by chance (A {shares[0]:.3f}, B {shares[1]:.3f} of 1): they did not "
                f"start there. Give the {self.name} that belongs to this adapter."
            )


def open_rescue(
    path: Path, anchor: Path | None, base: Path | None, residual: Path | None
) -> Rescue:
    """Check everything that headers tell.

    Args:
        path: of the trained PEFT folder.
        anchor: of the PEFT folder that was saved before training.
        base: of the base model's folder.
        residual: of the folder of the model that was saved without the adapter.

    Returns:
        the rescue.

    Raises:
        ConfigError: what was given cannot be meant together.
        UnsupportedAdapterError: the adapter's start cannot be rescued so.
        RescueError: the anchor is another adapter's.
        FormatError: a file is not what it should be.
    """
    _check_given(path, anchor, base, residual)
    folder = PeftFolder.open(path)
    init = folder.config.get("init_lora_weights", True)
    lifted = residual_start(init)
    _check_init(folder, lifted)
    model = None if base is None else Checkpoint.open(base)
    method, plain = (str(init) if lifted else "unknown"), frozenset[str]()
    source: Source
    if anchor is not None:
        name, source = "anchor", Saved(folder, PeftFolder.open(anchor), model)
    elif residual is not None:
        assert model is not None
        name, source = "residual", Subtracted(model, Checkpoint.open(residual))
    else:
        assert model is not None
        _check_recomputed(folder)
        name, source = "base", Recomputed(model, method.lower())
        # peft gives embeddings its default start, whatever the file names.
        layers = folder.shapes.layers.items()
        plain = frozenset(site for site, layer in layers if layer.layout.kind == "embedding")
    given = {"adapter": path, "anchor": anchor, "base model": base, "residual model": residual}
    inputs = {name: folder for name, folder in given.items() if folder is not None}
    return Rescue(folder, source, name, method, plain, inputs)


def _check_given(path: Path, anchor: Path | None, base: Path | None, residual: Path | None) -> None:
    if anchor is not None and residual is not None:
        raise ConfigError("give an anchor or a residual, not both.")
    if residual is not None and base is None:
        raise ConfigError(
            "a residual model tells nothing without the base model that it is to be compared "
            "with; give base (--base DIR) too."
        )
    if path.is_file():
        raise ConfigError(
            f"{path}: anchor, base and residual are for the folder of a PEFT adapter; a native "
            "file holds its anchors. Leave them out."
        )
    if anchor is not None and anchor.resolve() == path.resolve():
        raise ConfigError(
            f"{anchor}: is the trained adapter itself; give the one saved before training."
        )
    if residual is not None and base is not None and residual.resolve() == base.resolve():
        raise ConfigError(f"{residual}: is given both as base and as residual model.")


def _check_init(folder: PeftFolder, lifted: bool) -> None:
    init = folder.config.get("init_lora_weights", True)
    if not lifted and init not in PLAIN:
        refuse_residual(folder.path, folder.config)
    if isinstance(init, str) and init.lower() == "olora" and folder.config.get("fan_in_fan_out"):
        raise UnsupportedAdapterError(
            f"{folder.path}: it was trained with OLoRA on Conv1D layers, from which peft subtracts "
            "the transpose of B0·A0: before the first step the model was no longer the base, and "
            "no anchor describes that."
        )


def _check_recomputed(folder: PeftFolder) -> None:
    init = folder.config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() in RECOMPUTED:
        return
    if init in PLAIN:
        raise ConfigError(
            f"{folder.path}: init_lora_weights is {init!r}, a plain LoRA: leave out base. If it "
            "started from the base's weights all the same, give the adapter saved before training "
            "(anchor), or the residual model (residual)."
        )
    why = {
        "corda": "it depends on the data that its covariances were taken from",
        "lora_ga": "it depends on the gradients of the batches that it was given",
    }.get(str(init).lower(), "it draws random numbers, and other ones each time")
    raise UnsupportedAdapterError(
        f"{folder.path}: init_lora_weights is {init!r}: this start cannot be computed again: "
        f"{why}. {ways_to_rescue(init)}"
    )


def _share(rows: Tensor, basis: Tensor) -> float:
    """How much of `rows` lies in the span of `basis`, 0 for chance, 1 for all of it."""
    chance = len(basis) / basis.shape[1]
    size = float(rows.square().sum())
    if chance >= 1 or size == 0:
        return 1.0
    share = float((rows @ basis.T).square().sum()) / size
    return (share - chance) / (1 - chance)
