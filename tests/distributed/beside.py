"""What two ranks do beside training: going on, counting, detaching, failing; see on_two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_runs import (
    MIDDLE,
    STEPS,
    WHOLE,
    Variant,
    attach,
    go_on,
    keep,
    loss_of,
    make_model,
    make_optimizer,
    mine,
    rows,
    train,
    whole,
    wrap,
)
from torch import distributed, nn
from torch.distributed.tensor import DTensor

import tether
from tether import saving

ADAPTER = "adapter.safetensors"
Said = dict[str, Any]


def is_first() -> bool:
    return distributed.get_rank() == 0


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """This rank's logits of the first batch."""
    result: torch.Tensor = model(input_ids=mine(rows(0))).logits
    return result.clone()


def wrapped(mode: str, variant: Variant) -> tuple[nn.Module, tether.Handle]:
    """A new model with an adapter, as it is trained."""
    model = make_model(variant)
    handle = attach(model, variant)
    return wrap(model, mode, variant), handle


def same_file(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors."""
    here, there = load_file(one), load_file(other)
    return here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


def resume(mode: str, folder: Path) -> Said:
    """Train, keep the middle, train on; then go on from the middle; then from what one left."""
    model, handle = wrapped(mode, WHOLE)
    optimizer = make_optimizer(handle)
    said: Said = {"before": train(model, optimizer, 0, MIDDLE)}
    keep(model, handle, optimizer, folder)
    distributed.barrier()
    said["after"] = train(model, optimizer, MIDDLE, STEPS)
    handle.save(folder / "last.safetensors")

    model, handle, optimizer = go_on(mode, WHOLE, folder)
    said["again"] = train(model, optimizer, MIDDLE, STEPS)
    handle.save(folder / "again.safetensors")
    distributed.barrier()
    said["same"] = same_file(folder / "last.safetensors", folder / "again.safetensors")

    model, handle, optimizer = go_on(mode, WHOLE, folder.parent / "alone")
    said["from one"] = train(model, optimizer, MIDDLE, STEPS)
    return said


def memory(mode: str, folder: Path) -> Said:
    """Bytes of this rank, and of what it gets when the adapter is gathered."""
    del folder
    model, handle = wrapped(mode, Variant())
    optimizer = make_optimizer(handle)
    train(model, optimizer, 0, 1)
    held = tether.handles(model)["default"].memory()
    states = (value for state in optimizer.state.values() for value in state.values())
    moments = [value for value in states if value.numel() > 1]
    adapter = saving.gather(model, "default")
    storages = {
        factor.untyped_storage().data_ptr(): factor.untyped_storage().nbytes()
        for layer in adapter.layers.values()
        for factor in (layer.trainable.A, layer.trainable.B, layer.anchor.A, layer.anchor.B)
    }
    return {
        "anchor": held.anchor,
        "displacement": held.displacement,
        "optimizer": sum(local(value).untyped_storage().nbytes() for value in moments),
        "gathered": sum(storages.values()),
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def detach(mode: str, folder: Path) -> Said:
    """Take the adapter off, in saving and by itself."""
    model, handle = wrapped(mode, Variant())
    train(model, make_optimizer(handle))
    with tether.reference(model):
        base = logits(model)
    value = handle.snapshot()
    again = tether.handles(model)["default"]
    if mode == "fsdp":
        report = tether.save_as_lora(again, folder / "lora", dtype=torch.bfloat16, after="detach")
        said = {"report": [report.after, report.dtype, report.rank, len(report.sites)]}
    else:
        said = {"value": tether.compare(again.detach(), value).error}
    kept = [name for name, _ in model.named_parameters() if "tether" in name]
    return said | {
        "attached": handle.attached,
        "base": torch.equal(logits(model), base),
        "kept": kept,
    }


def between(folder: Path) -> Said:
    """A snapshot between forward and backward changes neither gradients nor itself."""
    del folder
    gradients, snapshots = [], []
    for look in (False, True):
        model, handle = wrapped("fsdp", Variant(reshard=False))
        loss = loss_of(model, 0)
        if look:
            snapshots = [handle.snapshot(), handle.snapshot()]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        gradients.append([whole(norm), *(whole(p.grad) for p in handle.parameters())])
    pairs = zip(*gradients, strict=True)
    return {
        "gradients": all(torch.equal(a, b) and a.any() for a, b in pairs if a.dim() == 0)
        and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)),
        "snapshots": tether.compare(*snapshots).error,
    }


def error_of(call: Callable[[], object]) -> list[str]:
    """The name of the error that a call raises, and its words."""
    try:
        call()
    except tether.TetherError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def writing_fails(folder: Path) -> Said:
    """Rank 0 cannot write; nothing that was there changes."""
    _, handle = wrapped("fsdp", Variant())
    taken, filled = folder / "taken", folder / "filled"
    if is_first():
        taken.mkdir(parents=True)
        filled.mkdir()
        (filled / "thesis.txt").write_text("mine")
    distributed.barrier()
    said = {
        "save": error_of(lambda: handle.save(taken)),
        "lora": error_of(lambda: tether.save_as_lora(handle, filled)),
        "rank": error_of(lambda: tether.save_as_lora(handle, folder / "new", rank=0)),
    }
    handle.save(folder / ADAPTER)  # and both go on
    distributed.barrier()
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return said | {"left": left}


def one_rank_writes(folder: Path) -> Said:
    """Where every rank has all of it, one may write, or all to the same place."""
    model, handle = wrapped("ddp", Variant())
    train(model, make_optimizer(handle), 0, 1)
    if is_first():
        handle.save(folder / "one.safetensors")
        tether.save_as_lora(handle, folder / "lora")
    distributed.barrier()
    for _ in range(5):
        handle.save(folder / "all.safetensors")
    distributed.barrier()
    same = same_file(folder / "one.safetensors", folder / "all.safetensors")
    return {"same": same, "left": sorted(path.name for path in folder.iterdir())}


def refused(folder: Path) -> Said:
    """What a sharded adapter cannot do, before anything is written."""
    _, handle = wrapped("fsdp", Variant())
    path = folder / "lora"
    return {
        "verify": error_of(
            lambda: tether.save_as_lora(handle, path, verify={"input_ids": rows(0)})
        ),
        "offload": error_of(lambda: tether.save_as_lora(handle, path, after="offload")),
        "left": folder.exists(),
    }
