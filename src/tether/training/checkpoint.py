"""What is needed to go on training: factors, optimizer moments, random state, in one file.

No pickle: a safetensors file with the tensors `factor.{name}`, `exp_avg.{name}`,
`exp_avg_sq.{name}`, `rng.cpu`, `rng.cuda`, and metadata `format`, `step` and `digest`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tether import fs
from tether.errors import DigestError, HeaderError, OffloadedError
from tether.formats import container
from tether.formats.native import digest, digest_texts
from tether.handle import Handle

_FORMAT = "tether-checkpoint"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(path: Path, handle: Handle, optimizer: torch.optim.AdamW, step: int) -> None:
    """Write a checkpoint in one rename.

    Args:
        path: of the file.
        handle: of the adapter in training.
        optimizer: over its factors.
        step: steps done.

    Raises:
        WriteError: it cannot be written; the older checkpoint stays.
        OffloadedError: the factors are not on the model.
    """
    if handle.offloaded:
        raise OffloadedError(
            f"adapter {handle.name!r} is offloaded: its factors are not on the model to be saved. "
            "Call handle.restore() first."
        )
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in handle.named_parameters():
        tensors[f"factor.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "step": str(step), "digest": _digest(tensors, step)}
    with fs.atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: Path, handle: Handle, optimizer: torch.optim.AdamW) -> int:
    """Put a checkpoint's factors, moments and random state in place.

    Args:
        path: of the file.
        handle: of the adapter, attached with the same sites and ranks.
        optimizer: over its factors.

    Returns:
        steps done.

    Raises:
        FormatError: the file is damaged, or belongs to another adapter. Nothing is changed.
    """
    tensors, metadata = container.read(path)
    step = metadata.get("step", "")
    if metadata.get("format") != _FORMAT or not (step.isascii() and step.isdigit()):
        raise HeaderError(f"{path}: not a training checkpoint of tether's.")
    if _digest(tensors, int(step)) != metadata.get("digest"):
        raise DigestError(f"{path}: its sha256 differs from the one written: it is damaged.")
    parameters = dict(handle.named_parameters())
    _check_names(path, tensors, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"factor.{name}"])
            if f"exp_avg.{name}" in tensors:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(int(step))),
                    **{m: tensors[f"{m}.{name}"].to(parameter.device, copy=True) for m in _MOMENTS},
                }
    torch.set_rng_state(tensors["rng.cpu"].clone())
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"].clone())
    return int(step)


def _check_names(
    path: Path, tensors: dict[str, Tensor], parameters: dict[str, torch.nn.Parameter]
) -> None:
    wanted: dict[str, Tensor] = {f"factor.{name}": p for name, p in parameters.items()}
    for moment in _MOMENTS:
        wanted |= {f"{moment}.{n}": p for n, p in parameters.items() if f"{moment}.{n}" in tensors}
    found = {name: t for name, t in tensors.items() if not name.startswith("rng.")}
    odd = sorted(set(wanted) ^ set(found))
    if odd or "rng.cpu" not in tensors:
        name = odd[0] if odd else "rng.cpu"
        raise HeaderError(f"{path}: tensor {name!r} does not fit the adapter that is trained here.")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise HeaderError(
                f"{path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the adapter's "
                f"is {wanted[name].dtype} {tuple(wanted[name].shape)}."
            )


def _digest(tensors: dict[str, Tensor], step: int) -> str:
    texts = [f"{name} {digest(tensor)}" for name, tensor in sorted(tensors.items())]
    return digest_texts(str(step), *texts)
