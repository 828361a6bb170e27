"""What each of two ranks does, under torchrun: every case in turn, and what came of it."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import beside
import torch
from beside import ADAPTER, Said, logits, same_file
from small_runs import (
    ONLY_SHARDED,
    VARIANTS,
    Variant,
    attach,
    loss_of,
    make_model,
    make_optimizer,
    train,
    whole,
    wrap,
)
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import tether


def runs() -> Iterator[tuple[str, str, Variant]]:
    """(name, mode, variant) of every training run."""
    for mode in ("ddp", "fsdp"):
        for name, variant in VARIANTS.items():
            yield f"{mode} {name}", mode, variant
    for name, variant in ONLY_SHARDED.items():
        yield f"fsdp {name}", "fsdp", variant


def cases() -> dict[str, Callable[[Path], Said]]:
    """Name -> what is called; the same on both ranks, in the same order."""
    found = {name: partial(run, mode, variant) for name, mode, variant in runs()}
    for mode in ("ddp", "fsdp"):
        found[f"resume {mode}"] = partial(beside.resume, mode)
        found[f"memory {mode}"] = partial(beside.memory, mode)
        found[f"detach {mode}"] = partial(beside.detach, mode)
    found["between"] = beside.between
    found["writing fails"] = beside.writing_fails
    found["one rank writes"] = beside.one_rank_writes
    found["refused"] = beside.refused
    return found


@contextmanager
def gathered(model: nn.Module) -> Iterator[list[str]]:
    """Names of the parameters that are gathered by hand within the block."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    names: list[str] = []
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    full_tensor = DTensor.full_tensor

    def spy(self: DTensor, **kwargs: Any) -> torch.Tensor:
        names.append(known[id(self)])
        return full_tensor(self, **kwargs)

    DTensor.full_tensor = spy  # type: ignore[method-assign]
    try:
        yield names
    finally:
        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]


def run(mode: str, variant: Variant, folder: Path) -> Said:
    """Train, look at the base meanwhile, and save."""
    model = make_model(variant)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    base, base_loss = logits(model), loss_of(model, 0).item()
    attach(model, variant)
    trained = wrap(model, mode, variant)
    (live,) = tether.handles(trained).values()
    if variant.half:
        with tether.reference(trained), torch.no_grad():
            base, base_loss = logits(trained), loss_of(trained, 0).item()
    with torch.no_grad():
        first = loss_of(trained, 0).item()
    # Made after a pass without a backward, when FSDP2 keeps some parameters gathered.
    said: Said = {"first": first == base_loss, "losses": train(trained, make_optimizer(live))}
    with tether.reference(trained):
        said["reference"] = torch.equal(logits(trained), base)
    with live.disabled():
        said["disabled"] = torch.equal(logits(trained), base)
    said["moved"] = not torch.equal(logits(trained), base)
    live.save(folder / ADAPTER)
    with gathered(model) as names:
        tether.save_as_lora(live, folder / "lora")
        live.save(folder / "again.safetensors")
    said["gathered"] = names
    said["same"] = snapshot_is(live, folder / ADAPTER)
    now = {n: t for n, t in model.named_parameters() if n in before}
    said["base"] = len(now) == len(before) and all(
        torch.equal(whole(t), before[n]) for n, t in now.items()
    )
    return said


def snapshot_is(handle: tether.Handle, path: Path) -> bool:
    """Whether a snapshot is what a file holds, on every rank."""
    distributed.barrier()
    again = path.with_name(f"rank-{distributed.get_rank()}.safetensors")
    tether.save(handle.snapshot(), again)
    return same_file(again, path)


def main(folder: Path) -> None:
    """Run the cases, and write what each rank saw."""
    # A rank that waits in vain fails soon.
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    said: Said = {}
    for name, case in cases().items():
        try:
            said[name] = case(folder / name)
        except Exception:  # noqa: BLE001
            said[name] = {"failed": traceback.format_exc()}
        distributed.barrier()
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
