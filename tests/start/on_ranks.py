"""What each rank does, under torchrun: every case in turn, and what came of it into a folder."""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import tether
from tether.methods import Context
from tether.methods.pissa import PiSSA
from tether.start import Search, find
from tether.value import Factors

SHAPES = ((128, 160), (160, 128), (128, 128), (128, 130), (12, 16))
CONFIG = tether.LoraConfig(rank=4, use_dora=True)
BAD = "2"  # the site that is NaN in one case
_CALLS: list[str] = []


def stack(shapes: tuple[tuple[int, int], ...] = SHAPES) -> nn.Module:
    """The same linear layers on every rank."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(inside, outside) for outside, inside in shapes)


def with_nan() -> nn.Module:
    """The layers, one of them unusable."""
    model = stack()
    model[int(BAD)].weight.data[0, 0] = torch.nan
    return model


def shifted(rank: int) -> nn.Module:
    """The layers, one of them with other values on rank 1."""
    model = stack()
    model[1].weight.data[0, 5] += rank
    return model


def cases(rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Name -> what is called; the same names on both ranks, in the same order."""
    uncached, one = Search(cache=False), ((128, 128),)
    return {
        "plain": lambda: find(stack(), CONFIG, uncached),
        "first": lambda: find(stack(), CONFIG, Search()),
        "second": lambda: find(stack(), CONFIG, Search()),
        "threads": lambda: find(stack(), CONFIG, Search(cache=False, workers=1 + rank)),
        "one site": lambda: find(stack(one), CONFIG, uncached),
        "configurations": lambda: find(stack(), tether.LoraConfig(rank=4 + rank), uncached),
        "seeds": lambda: find(stack(), tether.LoraConfig(rank=4, seed=rank), uncached),
        "models": lambda: find(stack(SHAPES[rank:]), CONFIG, uncached),
        "weights": lambda: find(shifted(rank), CONFIG, uncached),
        "rank too large": lambda: find(stack(), tether.LoraConfig(rank=4 + 125 * rank), uncached),
        "workers": lambda: find(stack(), CONFIG, Search(cache=False, workers=rank)),
        "no folder": lambda: find(
            stack(), CONFIG, Search(None if rank else folder / "none", cache=False)
        ),
        "nan": lambda: find(with_nan(), CONFIG, uncached),
        "alone": lambda: (
            find(stack(), CONFIG, Search(cache=False, distributed=False)) if rank else None
        ),
        "after all": lambda: find(stack(), CONFIG, uncached),
    }


def main(folder: Path) -> None:
    """Run the cases, and write what each rank saw."""
    # A rank that waits in vain fails soon.
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = distributed.get_rank()
    start = PiSSA.start

    def counted(self: PiSSA, weight: torch.Tensor, r: int, context: Context) -> Factors:
        _CALLS.append(context.path)
        return start(self, weight, r, context)

    PiSSA.start = counted
    said: dict[str, dict[str, Any]] = {}
    os.environ["TETHER_NO_CACHE"] = "0"
    os.environ["TETHER_CACHE"] = str(folder / "cache")
    for name, call in cases(rank, folder).items():
        _CALLS.clear()
        said[name] = {}
        try:
            found = call()
            if found is not None:
                said[name]["cached"] = found.cached
                tether.save(found.adapter, folder / f"{name}-{rank}.safetensors")
        except tether.TetherError as error:
            said[name] |= {"error": type(error).__name__, "message": str(error)}
        said[name]["calls"] = sorted(_CALLS)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
