"""Finding, keeping and loading the anchors of a whole model: SmolLM2, all linear sites, rank 16.

    python benchmarks/anchors_model.py [--rows "init*"] [--repeats 3] [--output FILE]

Nothing is timed but the named call: models are loaded and copied outside. peft writes into the
model it is given, so it gets a fresh copy every time.
"""

import copy
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import measure
import peft
import torch
import typer
import weights
from measure import Contender, Row, Target
from torch import Tensor, nn

import tether
import tether.start.site
from tether.integrations import hub, smollm2

BYTES = "SHA-256 of the bytes of every adapted weight"
SITE = {"product error": 1e-5}
# How far the factors are moved from their start before they are saved.
MOVED = 1e-2


def config(rank: int, init: str = "pissa") -> Any:
    """peft's configuration."""
    return peft.LoraConfig(
        init_lora_weights=init,
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def init(model: nn.Module, rank: int, cache: bool) -> tether.Adapter:
    """Our side."""
    return tether.init(model, tether.LoraConfig(init="pissa", rank=rank), cache=cache)


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of every site of a peft model."""
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): (
            module.lora_B["default"].weight.detach(),
            module.lora_A["default"].weight.detach(),
        )
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def our_factors(adapter: tether.Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of every anchor."""
    return {path: (layer.anchor.B, layer.anchor.A) for path, layer in adapter.layers.items()}


def worst(
    model: nn.Module, rank: int, found: Mapping[str, dict[str, tuple[Tensor, Tensor]]]
) -> dict[str, dict[str, float]]:
    """The worst site of each side.

    Args:
        model: holds the weights.
        rank: of the factors.
        found: the factors of each side, by site; the sides must have the same sites.

    Returns:
        for each side, the largest of each kind of error.
    """
    (first, *_), worst_of = found.values(), {name: {} for name in found}
    for name, factors in found.items():
        if set(factors) != set(first):
            raise ValueError(f"{name} adapts other sites: {sorted(set(factors) ^ set(first))}.")
    for number, path in enumerate(first, start=1):
        weight = model.get_submodule(path).weight.detach()
        u, s, vt = weights.svd_truth(weight)
        best = weights.Best(u[:, :rank] * s[:rank], vt[:rank])
        for name, factors in found.items():
            for kind, value in weights.accuracy(weight, *factors[path], best).items():
                worst_of[name][kind] = max(value, worst_of[name].get(kind, value))
        if number % 30 == 0:
            measure.say(f"  truth of {number} of {len(first)} sites")
    return worst_of


def hashing(model: nn.Module, paths: list[str]) -> Contender:
    """Reads every adapted weight once."""

    def work(_: Any) -> None:
        for path in paths:
            hashlib.sha256(model.get_submodule(path).weight.detach().numpy()).digest()

    return Contender(work)


def shares(work: Callable[[], object]) -> str:
    """Where the CPU time of one run at one thread goes, in words."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = call(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
            return result

        return inner

    places = {
        "decomposing": (tether.linalg, "top_svd"),
        "taking fingerprints": (tether.start.site, "fingerprint_tensor"),
    }
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for name, (module, attribute) in places.items():
            spied = timed(name, getattr(module, attribute))
            stack.enter_context(mock.patch.object(module, attribute, spied))
        timed("all", work)()
    parts = (f"{name} {seconds.get(name, 0.0) / seconds['all']:.0%}" for name in places)
    return ", ".join(parts)


def init_row(model: nn.Module, rank: int, repeats: int) -> Row:
    """All anchors of a model."""
    paths = list(init(model, rank, cache=False).layers)
    contenders = {
        "tether": Contender(lambda _: init(model, rank, cache=False)),
        "peft": Contender(
            lambda fresh: peft.get_peft_model(fresh, config(rank)), lambda: copy.deepcopy(model)
        ),
        measure.LIMIT: hashing(model, paths),
    }
    sides, results = measure.run(contenders, repeats)
    found = {"tether": our_factors(results["tether"]), "peft": peft_factors(results["peft"])}
    for name, errors in worst(model, rank, found).items():
        sides[name].accuracy = errors
        sides[name].notes = {"sites": str(len(paths)), "accuracy": "of the worst site"}
    sides["tether"].notes["time"] = shares(lambda: init(model, rank, cache=False))
    how = "tether: `init`, no cache, every weight fingerprinted; peft: `get_peft_model`, `pissa`"
    target = Target(4.5, aim=8, accuracy=SITE)
    return Row("init SmolLM2 r16", how, sides, target=target, limit=BYTES)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a fixed short text."""
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, size, (1, 32), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@torch.no_grad()
def move(parameters: Iterator[Tensor]) -> None:
    """Stands for training: some random step of every factor."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=MOVED)


def saved_by_tether(model: nn.Module, rank: int, path: Path) -> Tensor:
    """Save an adapter that has moved; its logits, and nothing left on the model."""
    handle = tether.attach(model, init(model, rank, cache=False))
    move(handle.parameters())
    found = logits(model)
    handle.save(path)
    handle.detach()
    return found


def saved_by_peft(model: nn.Module, rank: int, path: Path) -> Tensor:
    """The same with peft, on a copy of the model."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config(rank))
    move(p for p in adapted.parameters() if p.requires_grad)
    adapted.eval().save_pretrained(path)
    return logits(adapted)


def difference(one: Tensor, other: Tensor) -> dict[str, float]:
    """Of two outputs, relative to the second."""
    return {"logits": float((one - other).abs().max() / other.abs().max())}


def load_row(model: nn.Module, rank: int, repeats: int) -> Row:
    """A saved adapter on a fresh model."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs"
        live = {
            "tether": saved_by_tether(model, rank, ours),
            "peft": saved_by_peft(model, rank, theirs),
        }
        contenders = {
            "tether": Contender(
                lambda fresh: (tether.attach(fresh, tether.load(ours)), fresh)[1],
                lambda: copy.deepcopy(model),
            ),
            "peft": Contender(
                lambda fresh: peft.PeftModel.from_pretrained(fresh, theirs).eval(),
                lambda: copy.deepcopy(model),
            ),
            measure.LIMIT: hashing(model, list(tether.load(ours).layers)),
        }
        sides, results = measure.run(contenders, repeats)
    for name, wanted in live.items():
        sides[name].accuracy = difference(logits(results[name]), wanted)
    how = (
        "a PiSSA adapter, moved and saved, onto a fresh model. tether: `load` and `attach`, every "
        "weight verified; peft: `PeftModel.from_pretrained`, which starts PiSSA again"
    )
    target = Target(40, aim=60, accuracy={"logits": 1e-5})
    return Row("load SmolLM2 r16", how, sides, target=target, limit=BYTES)


@contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """Keep anchors in a folder of one's own."""
    names = ("TETHER_CACHE", "TETHER_NO_CACHE")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["TETHER_CACHE"] = folder
    try:
        yield
    finally:
        del os.environ["TETHER_CACHE"]
        os.environ.update(before)


def same(one: tether.Adapter, other: tether.Adapter) -> dict[str, float]:
    """The largest difference between the anchors of two adapters."""
    pairs = (our_factors(one), our_factors(other))
    return {
        "difference": max(
            float((x - y).abs().max())
            for path in pairs[0]
            for x, y in zip(pairs[0][path], pairs[1][path], strict=True)
        )
    }


def cache_row(model: nn.Module, rank: int, repeats: int) -> Row:
    """The second `init` of a model, after the first has kept its anchors."""
    with tempfile.TemporaryDirectory() as parent:

        def empty() -> None:
            os.environ["TETHER_CACHE"] = tempfile.mkdtemp(dir=parent)

        # The second follows the first in each turn, and finds what that has kept.
        with cache_in(parent):
            contenders = {
                "first init": Contender(lambda _: init(model, rank, cache=True), empty),
                "tether": Contender(lambda _: init(model, rank, cache=True)),
            }
            paths = list(init(model, rank, cache=False).layers)
            contenders[measure.LIMIT] = hashing(model, paths)
            sides, results = measure.run(contenders, repeats)
    sides["tether"].accuracy = same(results["tether"], results["first init"])
    target = Target(10, aim="the disk's speed", accuracy={"difference": 0.0})
    how = "`init` with the cache, after an `init` that found it empty"
    return Row(
        "second init SmolLM2 r16", how, sides, theirs="first init", target=target, limit=BYTES
    )


ROWS: dict[str, Callable[[nn.Module, int, int], Row]] = {
    "init": init_row,
    "load": load_row,
    "cache": cache_row,
}


def measured(
    model: nn.Module, pattern: str, rank: int, repeats: int, output: Path | None
) -> list[Row]:
    """The rows whose names fit; the record is written anew after each."""
    rows: list[Row] = []
    for name, row_of in ROWS.items():
        if fnmatch(name, pattern):
            measure.say(name)
            rows.append(row_of(model, rank, repeats))
            if output is not None:
                measure.record(rows, output)
    return rows


def main(
    rows: Annotated[str, typer.Option(help="init, load or cache; or a pattern.")] = "*",
    repeats: Annotated[int, typer.Option(help="Turns at one thread, and at all.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON of what was measured.")] = None,
) -> None:
    """Measure and print all rows."""
    warnings.simplefilter("ignore")
    model = hub.load_model(str(smollm2.folder()), torch.float32, "cpu")
    measure.show(measured(model, rows, 16, repeats, output))


if __name__ == "__main__":
    typer.run(main)
