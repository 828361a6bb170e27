"""What is needed to go on training: factors, optimizer moments, random state, in one file.

No pickle: a safetensors file with the tensors `factor.{name}`, `exp_avg.{name}`,
`exp_avg_sq.{name}`, `rng.cpu`, `rng.cuda`, and metadata `format`, `step`, `adapter` (of which
method and base; older files have none) and `digest`.
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
_DO = "Put the run's own checkpoint back, or begin a new run in another --out."


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
    metadata = {"format": _FORMAT, "step": str(step), "adapter": _origin(handle)}
    metadata["digest"] = _digest(tensors, step, metadata["adapter"])
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
    origin = metadata.get("adapter", "")
    if _digest(tensors, int(step), origin) != metadata.get("digest"):
        raise DigestError(f"{path}: its sha256 differs from the one written: it is damaged.")
    parameters = dict(handle.named_parameters())
    _check_names(path, tensors, parameters)
    here = _origin(handle)
    if origin not in ("", here):
        raise HeaderError(
            f"{path}: is of an adapter of {origin!r}, the one here is {here!r}. {_DO}"
        )
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
        raise HeaderError(
            f"{path}: tensor {name!r} does not fit the adapter that is trained here. {_DO}"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise HeaderError(
                f"{path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the adapter's "
                f"is {wanted[name].dtype} {tuple(wanted[name].shape)}. {_DO}"
            )


def _origin(handle: Handle) -> str:
    """What factors of the same names and shapes must agree in besides: method, base, and anchor."""
    about = handle.source().about
    origin = about.provenance
    prints = sorted(origin.fingerprints.items())
    base = digest_texts(*(f"{path} {found.sha256}" for path, found in prints))
    seed = f", seed {origin.seed}" if about.anchored else ""  # else the checkpoint holds it all
    return f"method {origin.method}{seed}, base sha256 {base}"


def _digest(tensors: dict[str, Tensor], step: int, origin: str) -> str:
    texts = [f"{name} {digest(tensor)}" for name, tensor in sorted(tensors.items())]
    return digest_texts(str(step), *texts, *([origin] if origin else []))
