"""Compare the live model with base + exported file, on one batch, leaving no trace."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tether import algebra
from tether.attach import attach
from tether.conversion import Verification
from tether.errors import ConfigError, VerificationError
from tether.formats import peft_read
from tether.handle import Handle
from tether.layers import layers_of
from tether.start import original
from tether.switch import only, quiet, reference
from tether.value import Adapter

_IGNORED = -100  # transformers' label of a token that is not predicted
# Relative error of the logits: rounding of the model itself, in the dtype of the file.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_REDUCED = 0.25  # where a smaller rank was asked for


@torch.no_grad()
def check(
    handle: Handle,
    folder: Path,
    batch: Any,
    dtype: torch.dtype,
    tolerance: float | None,
    reduced: bool,
) -> Verification:
    """Raise unless base + file gives the live model's logits.

    Args:
        handle: of the live adapter; the model is as before afterwards.
        folder: a PEFT folder, not yet in its place.
        batch: named inputs of the model as a mapping, or its one positional input.
        dtype: of the file.
        tolerance: largest relative error of the logits; None for 1e-3 in float32, 5e-2 in
            bfloat16, 1e-2 in float16, and 0.25 where a smaller rank was asked for.
        reduced: whether a smaller rank was asked for.

    Returns:
        what was measured, with the loss at the full rank, half and a quarter of it.

    Raises:
        VerificationError: the error is above the tolerance.
        ConfigError: the model's output holds no logits.
    """
    if tolerance is None:
        tolerance = _REDUCED if reduced else _TOLERANCES[dtype]
    model = handle.model
    losses: dict[str, float] = {}
    with _eager(model):
        with reference(model):
            _note(losses, "base", _run(model, batch), batch)
        with only(model, handle.name):
            output = _run(model, batch)
            _note(losses, "live", output, batch)
            live = _logits(output)
        value = peft_read.load(folder)
        with _guest(model, value, handle.name):
            there = _logits(_run(model, batch))
        if losses:
            for name, rank in _ranks(handle).items():
                cut = algebra.to_lora(handle.snapshot(), rank)
                with _guest(model, cut, handle.name):
                    _note(losses, name, _run(model, batch), batch)
    error, largest = _distance(live, there)
    # Not error > tolerance: NaN must not pass.
    if not error <= tolerance:
        raise VerificationError(
            f"base + exported file differs from the live model: relative error of the logits "
            f"{error:.3g}, above {tolerance:.3g}. Nothing was published. Is the base the one that "
            "the adapter lives on? Save with a larger rank or dtype, or raise verify_tolerance."
        )
    return Verification(error, largest, tolerance, losses)


def _ranks(handle: Handle) -> dict[str, int]:
    """The full rank of the plain form, half and a quarter of it: 2r, r and r/2 with an anchor."""
    layers = handle.snapshot().layers.values()
    full = max(layer.rank * (1 if layer.anchor is None else 2) for layer in layers)
    ranks = [rank for rank in (full, full // 2, full // 4) if rank > 0]
    return {f"rank {rank}": rank for rank in ranks}


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Evaluate without compiled graphs, gradients or a trace in the random state."""
    with quiet(original(model)), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _guest(model: nn.Module, value: Adapter, name: str) -> Iterator[None]:
    """Only this value on the model within the block."""
    taken = layers_of(model)
    guest = next(f"{name}-{n}" for n in range(len(taken) + 1) if f"{name}-{n}" not in taken)
    # Not beside the live adapter: two cannot train one module whole at a time.
    with reference(model):
        handle = attach(model, value, guest, trainable=False, verify=False)
        try:
            with only(model, guest):
                yield
        finally:
            handle.detach()


def _run(model: nn.Module, batch: Any) -> Any:
    inner = original(model)
    return inner(**batch) if isinstance(batch, Mapping) else inner(batch)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"verify: the model gives {type(output).__name__}, without logits to compare."
        )
    return logits.detach().double().cpu()


def _distance(live: Tensor, there: Tensor) -> tuple[float, float]:
    difference = live - there
    size, apart = (float(torch.linalg.vector_norm(t)) for t in (live, difference))
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    if size == 0:
        return (0.0 if apart == 0 else math.inf), largest
    return apart / size, largest


def _note(losses: dict[str, float], name: str, output: Any, batch: Any) -> None:
    """The loss of an output: the model's own, or of the next tokens of `input_ids`."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) and isinstance(batch, Mapping) and "input_ids" in batch:
        tokens, logits = batch["input_ids"], getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.shape[:2] == tokens.shape and logits.dim() == 3:
            mask = batch.get("attention_mask", torch.ones_like(tokens))
            targets = torch.where(mask.bool(), tokens, torch.full_like(tokens, _IGNORED))
            loss = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                targets[:, 1:].flatten(),
                ignore_index=_IGNORED,
            )
    if isinstance(loss, Tensor):
        losses[name] = float(loss)
