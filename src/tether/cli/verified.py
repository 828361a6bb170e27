"""Convert with a check: load the base, attach the adapter, compare logits before publishing."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tether import formats, rescue
from tether.attach import attach
from tether.cli.console import Bars
from tether.conversion import ConversionReport
from tether.errors import ConfigError
from tether.export import save_as_lora
from tether.formats import peft_config
from tether.formats.peft_residual import residual_start
from tether.training import data, inputs
from tether.training.settings import Settings
from tether.value import Adapter

_SEQUENCES, _BLOCK = 4, 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is converted.

    Attributes:
        adapter: native file or PEFT folder.
        anchor: PEFT folder saved before training.
        base: folder or hub id of the base model.
        residual: folder of the model saved without the adapter.
    """

    adapter: Path
    anchor: Path | None
    base: Path | None
    residual: Path | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the result may be.

    Attributes:
        rank: largest of any site.
        tolerance: largest relative error from reducing the rank.
        dtype: of the file.
    """

    rank: int | None
    tolerance: float | None
    dtype: torch.dtype

    @property
    def reduced(self) -> bool:
        """Whether a smaller rank was asked for."""
        return self.rank is not None or self.tolerance is not None


def verified(
    given: Inputs,
    output: Path,
    limits: Limits,
    text: str,
    tolerance: float | None,
    bars: Bars,
) -> ConversionReport:
    """Write a plain LoRA folder after comparing logits on a text.

    Args:
        given: adapter and base.
        output: the folder.
        limits: of the result.
        text: file whose first sequences are compared.
        tolerance: largest relative error of the logits.
        bars: shows progress.

    Returns:
        the report, with its verification.

    Raises:
        ConfigError: there is no base, or the output is a native file.
        VerificationError: the logits differ; nothing is written.
    """
    if given.base is None:
        raise ConfigError("--verify compares with the live model: give its --base too.")
    if output.suffix == ".safetensors":
        raise ConfigError("--verify is for a plain LoRA folder; a native file is exact.")
    folders = {"adapter": given.adapter, "anchor": given.anchor, "base model": given.base}
    folders["residual model"] = given.residual
    rescue.check_output(output, {name: p for name, p in folders.items() if p is not None})
    value = _load(given)
    model, tokenizer = inputs.load_base(Settings(model=str(given.base)), bars)
    sequences = data.load(text, tokenizer, _BLOCK)
    chosen = range(min(_SEQUENCES, len(sequences)))
    batch = sequences.batch(list(chosen), next(model.parameters()).device)
    with bars.task("Attaching"):
        handle = attach(model, value, trainable=False)
    with bars.task("Converting") as task:
        return save_as_lora(
            handle,
            output,
            rank=limits.rank,
            tolerance=limits.tolerance,
            dtype=limits.dtype,
            after="keep",
            verify=batch,
            verify_tolerance=tolerance,
            progress=task,
        )


def _load(given: Inputs) -> Adapter:
    """The adapter, rescued where it lives on a residual model."""
    alone = given.anchor is None and given.residual is None
    if alone and given.adapter.is_dir():
        init = peft_config.read_config(given.adapter).get("init_lora_weights", True)
        alone = not residual_start(init)
    if alone:
        return formats.load(given.adapter)
    return rescue.load(given.adapter, anchor=given.anchor, base=given.base, residual=given.residual)
