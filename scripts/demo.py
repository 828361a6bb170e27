"""The whole story on a real model: train, save, evaluate every form, go on training, detach.

Run by `make demo`. Prints one table of held-out losses and fails if the forms disagree.
"""

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

import tether
from tether.cli.console import Bars, use_all_cores
from tether.training import inputs
from tether.training import run as runs
from tether.training.evaluate import evaluate
from tether.training.settings import Settings

AGREE = 1e-3  # relative difference of the loss, live adapter against peft, float32
SAME = 1e-6  # live adapter against the same numbers in another process
MORE = 10  # steps after saving


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: was evaluated.
        loss: held out.
        check: what must hold of it.
        good: whether it does.
    """

    what: str
    loss: float
    check: str
    good: bool


def main(steps: int = 40, out: Path = Path("demo-out"), eval_limit: int = 32) -> None:
    """Run the story.

    Args:
        steps: of training.
        out: folder for the results; an earlier demo's is replaced.
        eval_limit: most held-out sequences per evaluation.
    """
    use_all_cores()
    bars = Bars()
    settings = Settings(steps=steps, eval_limit=eval_limit)
    run = runs.prepare(settings, out, overwrite=True, reporter=bars)
    with tether.reference(run.model):
        before = tether.fingerprint(run.model), _logits(run)
    base = run.losses["base"]
    runs.execute(run)
    live = run.losses["adapter"]
    saved = (out / runs.ADAPTER).read_bytes()
    reloaded = _in_new_process(out, eval_limit)
    by_peft = _by_peft(run)
    run.settings = replace(settings, steps=steps + MORE)
    run.out = out / "continued"
    runs.execute(run)
    continued = run.losses["adapter"]
    run.handle.detach()
    after = tether.fingerprint(run.model), _logits(run)
    again = run.evaluate().loss
    same_base = before[0] == after[0] and torch.equal(before[1], after[1]) and again == base
    changed = continued != live and (out / runs.ADAPTER).read_bytes() == saved
    rows = [
        Row("base", base, "", True),
        Row(f"live adapter, {steps} steps", live, "below the base", live < base),
        Row(
            "native file, new process",
            reloaded,
            f"live within {SAME:g}",
            _near(reloaded, live, SAME),
        ),
        Row("plain LoRA, by peft", by_peft, f"live within {AGREE:g}", _near(by_peft, live, AGREE)),
        Row(
            f"{MORE} more steps after saving", continued, "moved on; saved file unchanged", changed
        ),
        Row("base again, after detach", again, "bitwise the first", same_base),
    ]
    _show(rows, out)
    if not all(row.good for row in rows):
        raise typer.Exit(1)


def _logits(run: runs.Run) -> torch.Tensor:
    batch = run.held_out.batch([0], next(run.model.parameters()).device)
    with torch.no_grad():
        logits: torch.Tensor = run.model(batch["input_ids"]).logits
    return logits


def _in_new_process(out: Path, eval_limit: int) -> float:
    adapter, limit = str(out / runs.ADAPTER), str(eval_limit)
    command = [sys.executable, "-m", "tether", "eval", "default", adapter]
    done = subprocess.run(
        [*command, "--limit", limit, "--json"], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout)["adapters"][adapter]["loss"])


def _by_peft(run: runs.Run) -> float:
    fresh, _ = inputs.load_base(run.settings, Bars())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = PeftModel.from_pretrained(fresh, str(run.out / runs.LORA))
    size, limit = run.settings.batch_size, run.settings.eval_limit
    return evaluate(model, run.held_out, size, limit).loss


def _near(loss: float, other: float, tolerance: float) -> bool:
    return abs(loss - other) <= tolerance * abs(other)


def _show(rows: list[Row], out: Path) -> None:
    table = Table("", "held-out loss", "must be", "")
    for row in rows:
        table.add_row(row.what, f"{row.loss:.6f}", row.check, "yes" if row.good else "NO")
    Console(width=100).print(table)
    record = {row.what: {"loss": row.loss, "good": row.good} for row in rows}
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
