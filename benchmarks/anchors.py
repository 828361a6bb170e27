"""Finding the anchor of one weight: ours beside peft's, and beside its matrix products alone.

Timed is weight -> factors A and B. Ours: `linalg.top_svd` or `linalg.leading_qr`, and the factors
from it. peft's: `pissa_init` or `olora_init` of its own LoRA layer around an nn.Linear that holds
the weight; they also subtract B·A from the weight, which costs next to nothing beside the rest.

    python benchmarks/anchors.py [--rows "pissa*"] [--repeats 3] [--output FILE] [--shrink 64]
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import measure
import peft
import products
import torch
import typer
import weights
from measure import Contender, Row, Target
from torch import Tensor, nn
from weights import Matrix

from tether import linalg
from tether.integrations import smollm2
from tether.linalg import Certificate

HOW = "weight to A and B. tether: `{ours}`; peft: `{theirs}` of its layer, residual included"
PRODUCTS = "the products of the weight that our run made, alone"
# The spectra of the two large squares, as in SmolLM2: its widest layer, and its square one.
SOURCES = {2048: "self_attn.q_proj"}
LARGE = "mlp.gate_proj"


@dataclass(frozen=True, slots=True)
class Work:
    """One row.

    Attributes:
        name: of the row.
        matrix: the weight's name: "4096×4096", or one of a model's own.
        rank: of the factors.
        peft: its `init_lora_weights`.
        criterion: what our tolerance bounds; not used by OLoRA.
        tolerance: of our result.
        target: what is wanted.
    """

    name: str
    matrix: str
    rank: int = 16
    peft: str = "pissa"
    criterion: str = "product"
    tolerance: float = 1e-5
    target: Target | None = None


PRODUCT, EXCESS = {"product error": 1e-5}, {"excess": 1e-6}
SQUARE, TALL = "4096×4096", "14336×4096"
WORKS = (
    Work("pissa 4096² r16", SQUARE, target=Target(35, aim=60, accuracy=PRODUCT)),
    Work("pissa 4096² r64", SQUARE, 64, target=Target(15, aim=25, accuracy=PRODUCT)),
    Work("pissa 4096² r128", SQUARE, 128, target=Target(10, aim=16, accuracy=PRODUCT)),
    Work(
        "pissa 4096² r16, excess 1e-6, beside niter_16",
        SQUARE,
        peft="pissa_niter_16",
        criterion="excess",
        tolerance=1e-6,
        target=Target(1.5, aim=3.5, accuracy=EXCESS),
    ),
    Work("pissa 14336×4096 r64", TALL, 64, target=Target(5, aim=20, accuracy=PRODUCT)),
    Work(
        "olora 4096² r16",
        SQUARE,
        peft="olora",
        target=Target(100, aim=200, accuracy=PRODUCT),
    ),
    Work("pissa 2048² r16", "2048×2048"),
)
# A certificate is an estimate, within a factor of 3 of the truth. It speaks of the decomposition;
# the factors are then rounded to float32.
FACTOR = 3
ROUNDING = {"product error": 5e-7, "excess": 1e-12}
# What is at least wanted of the row beside niter_16 where passes are made in bfloat16.
BFLOAT16_AT_LEAST = 2.5


def decompose(weight: Tensor, work: Work) -> tuple[Tensor, Tensor, Certificate | None]:
    """Our side: B, A, and the certificate if there is one."""
    if work.peft == "olora":
        return *linalg.leading_qr(weight, work.rank), None
    svd = linalg.top_svd(weight, work.rank, work.tolerance, criterion=work.criterion)
    root = svd.s.sqrt()
    return svd.u * root, root[:, None] * svd.vt, svd.certificate


def certified(certificate: Certificate | None, measured: dict[str, float]) -> dict[str, str]:
    """What a result says of itself, and whether that is true.

    Args:
        certificate: None if there is none.
        measured: the errors that were measured.

    Returns:
        notes; with "broken" if an error is larger than the estimate allows.
    """
    if certificate is None:
        return {}
    notes = {"route": certificate.route, "unique": "yes" if certificate.unique else "no"}
    if certificate.fallback:
        notes["fallback"] = certificate.fallback
    estimates = {"product error": certificate.product_error, "excess": certificate.excess}
    for name, value in estimates.items():
        notes[f"estimated {name}"] = f"{value:.1e}"
        # Where many products are equally good, how far ours is from one of them means nothing.
        counts = certificate.unique or name == "excess"
        if counts and not measured[name] <= FACTOR * value + ROUNDING[name]:
            notes[measure.BROKEN] = f"of {name} {value:.1e}, measured {measured[name]:.1e}"
    return notes


class Site(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.site = nn.Linear(columns, rows, bias=False, device="meta")
        self.site.weight = nn.Parameter(weight, requires_grad=False)


def peft_layer(weight: Tensor, rank: int) -> Any:
    """peft's LoRA layer on a copy of the weight: scaling 1, not yet started."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["site"], init_lora_weights=False
    )
    return peft.get_peft_model(Site(weight.clone()), config).base_model.model.site


def peft_start(layer: Any, init: str) -> tuple[Tensor, Tensor]:
    """peft's side: its own code."""
    if init == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", init)
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight


@torch.no_grad()
def row_of(work: Work, matrix: Matrix, repeats: int) -> Row:
    """Measure one row.

    Args:
        work: what to do.
        matrix: on which weight.
        repeats: how often.

    Returns:
        the row, with the accuracy of both sides.
    """
    weight = matrix.weight
    measure.say(work.name)
    seen = products.of(lambda: decompose(weight, work), weight)
    contenders = {
        "tether": Contender(lambda _: decompose(weight, work)),
        "peft": Contender(
            lambda layer: peft_start(layer, work.peft), lambda: peft_layer(weight, work.rank)
        ),
    }
    if seen.found:
        contenders[measure.LIMIT] = Contender(products.alone(seen.found))
    sides, results = measure.run(contenders, repeats)
    olora = work.peft == "olora"
    best = weights.qr_best(weight, work.rank) if olora else matrix.best(work.rank)
    for name in ("tether", "peft"):
        sides[name].accuracy = weights.accuracy(weight, *results[name][:2], best)
    ours = sides["tether"]
    ours.notes = certified(results["tether"][2], ours.accuracy) | {
        "products": f"{len(seen.found)} with {seen.columns()} vectors in all"
    }
    target = work.target
    if target and work.peft == "pissa_niter_16" and torch.bfloat16 in seen.dtypes():
        target = replace(target, at_least=BFLOAT16_AT_LEAST)
    theirs = "olora_init" if olora else f'pissa_init("{work.peft}")'
    asked = f"top_svd({work.tolerance:.0e}, {work.criterion})"
    how = HOW.format(ours="leading_qr" if olora else asked, theirs=theirs)
    return Row(work.name, how, sides, target=target, limit=PRODUCTS if seen.found else "")


def large(name: str, shrink: int = 1) -> Matrix:
    """A matrix with SmolLM2's spectrum, of the shape in its name, all sizes divided."""
    rows, columns = (max(int(size) // shrink, 8) for size in name.split("×"))
    part = SOURCES.get(int(name.split("×")[1]), LARGE)
    measure.say(f"making {rows}×{columns} and its truth")
    file = smollm2.folder() / "model.safetensors"
    return weights.make((rows, columns), weights.spectrum(file, part), name=name)


def model_works() -> tuple[list[tuple[Work, Callable[[], Matrix]]], list[str]]:
    """The rows on the real matrices of two small models, and what is left out of them."""
    files = {"SmolLM2": smollm2.folder() / "model.safetensors"}
    minilm, reason = weights.minilm()
    if minilm is not None:
        files["MiniLM"] = minilm
    found = []
    for model, file in files.items():
        for part, shape in weights.shapes(file).items():
            rank, module = min(16, min(shape) // 2), ".".join(part.split(".")[-2:])
            work = Work(f"pissa {model} {module} {shape[0]}×{shape[1]} r{rank}", part, rank)
            found.append((work, lambda f=file, p=part: weights.real(f, p, p)))
    return found, [reason] if reason else []


def chosen(pattern: str, shrink: int) -> tuple[list[tuple[Work, Callable[[], Matrix]]], list[str]]:
    """The rows whose names fit, each with what makes its matrix; and what is left out."""
    make = cache(large)
    rows = []
    for work in WORKS:
        if shrink > 1:
            smallest = min(max(int(size) // shrink, 8) for size in work.matrix.split("×"))
            rank, name = min(work.rank, smallest // 2), f"{work.name}, sizes ÷ {shrink}"
            work = replace(work, name=name, rank=rank, target=None)
        rows.append((work, lambda name=work.matrix: make(name, shrink)))
    more, left_out = model_works()
    return [(w, m) for w, m in rows + more if fnmatch(w.name, pattern)], left_out


def measured(pattern: str, repeats: int, shrink: int, output: Path | None) -> Iterator[Row]:
    """Every row; the record is written anew after each, so that a stopped run leaves its own."""
    works, left_out = chosen(pattern, shrink)
    rows: list[Row] = []
    for work, matrix in works:
        rows.append(row_of(work, matrix(), repeats))
        if output is not None:
            measure.record(rows, output, left_out)
        yield rows[-1]
    for reason in left_out:
        measure.say(f"left out: {reason}")


def warm_up() -> None:
    """Let both sides load what they load on first use."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for work in (Work("", "", 4), Work("", "", 4, "olora"), Work("", "", 4, "pissa_niter_16")):
        decompose(weight, work)
        peft_start(peft_layer(weight, 4), work.peft)


def main(
    rows: Annotated[str, typer.Option(help="Only those whose names fit this pattern.")] = "*",
    repeats: Annotated[int, typer.Option(help="Turns at one thread, and at all.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON of what was measured.")] = None,
    shrink: Annotated[int, typer.Option(help="Divide all sizes, for a trial; no targets.")] = 1,
) -> None:
    """Measure and print all rows."""
    warnings.simplefilter("ignore")
    warm_up()
    measure.show(list(measured(rows, repeats, shrink, output)))


if __name__ == "__main__":
    typer.run(main)
