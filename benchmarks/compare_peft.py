"""What people lose: peft's column and ours, measured side by side on SmolLM2-135M.

For PiSSA (peft's recommended `pissa_niter_4`) and OLoRA: train 20 steps at rank 16 on all linear
layers, then measure the held-out loss of every state that should be the live adapter's or the
base's. Same data, same order, same optimizer, same machine.

    python benchmarks/compare_peft.py [--steps 20] [--output FILE]
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import tether
from tether.cli.console import Bars, use_all_cores
from tether.training import inputs, loop
from tether.training.data import Sequences
from tether.training.evaluate import evaluate, token_loss
from tether.training.settings import Settings

ROWS = (
    "live adapter after training",
    "saved and loaded the plain way",
    "adapter disabled",
    "a second adapter added",
    "after unload / detach",
)


class Bench:
    """The shared parts: base model, data, optimizer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _, tokenizer = inputs.load_base(settings, Bars())
        self.data, self.held_out = inputs.load_data(settings, tokenizer)

    def base(self) -> nn.Module:
        return inputs.load_base(self.settings, Bars(quiet=True))[0]

    def loss(self, model: nn.Module) -> float:
        return evaluate(model, self.held_out, 4, self.settings.eval_limit).loss

    def train(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """The library's schedule and order, on whatever parameters there are."""
        settings, chosen = self.settings, list(parameters)
        total = settings.total_steps(len(self.data))
        optimizer = torch.optim.AdamW(chosen, weight_decay=0.0)
        model.train()
        for number in range(1, total + 1):
            optimizer.param_groups[0]["lr"] = loop.learning_rate(number, total, settings)
            indices = loop.order(number, len(self.data), settings.batch_size, settings.seed)
            loss, tokens = token_loss(model, self._batch(self.data, indices))
            optimizer.zero_grad()
            (loss / tokens).backward()
            nn.utils.clip_grad_norm_(chosen, settings.clip)
            optimizer.step()
        model.eval()

    def _batch(self, data: Sequences, indices: list[int]) -> dict[str, torch.Tensor]:
        return data.batch(indices, torch.device("cpu"))


def by_peft(bench: Bench, init: str) -> dict[str, float]:
    config = peft.LoraConfig(
        init_lora_weights=init,
        r=16,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(bench.base(), config)
    bench.train(model, (p for p in model.parameters() if p.requires_grad))
    found = {ROWS[0]: bench.loss(model)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found[ROWS[1]] = bench.loss(peft.PeftModel.from_pretrained(bench.base(), folder))
    with model.disable_adapter():
        found[ROWS[2]] = bench.loss(model)
    model.add_adapter("second", replace(config))
    model.set_adapter("default")
    found[ROWS[3]] = bench.loss(model)
    found[ROWS[4]] = bench.loss(model.unload())
    return found


def by_tether(bench: Bench, init: str) -> dict[str, float]:
    config = tether.LoraConfig(init=init, rank=16)
    model = bench.base()
    handle = tether.attach(model, config)
    bench.train(model, handle.parameters())
    found = {ROWS[0]: bench.loss(model)}
    with tempfile.TemporaryDirectory() as folder:
        handle.save(Path(folder) / "a.safetensors")
        fresh = bench.base()
        tether.attach(fresh, tether.load(Path(folder) / "a.safetensors"))
        found[ROWS[1]] = bench.loss(fresh)
    with handle.disabled():
        found[ROWS[2]] = bench.loss(model)
    second = tether.attach(model, config, name="second")
    with tether.only(model, "default"):
        found[ROWS[3]] = bench.loss(model)
    second.detach()
    handle.detach()
    found[ROWS[4]] = bench.loss(model)
    return found


def main(steps: int = 20, eval_limit: int = 32, output: Path | None = None) -> None:
    """Measure all columns and print them as a table in Markdown."""
    use_all_cores()
    warnings.simplefilter("ignore")
    bench = Bench(Settings(steps=steps, eval_limit=eval_limit))
    base = bench.loss(bench.base())
    columns: dict[str, tuple[Callable[[Bench, str], dict[str, float]], str]] = {
        "peft pissa_niter_4": (by_peft, "pissa_niter_4"),
        "peft olora": (by_peft, "olora"),
        "tether pissa": (by_tether, "pissa"),
        "tether olora": (by_tether, "olora"),
    }
    results, seconds = {}, {}
    for name, (measure, init) in columns.items():
        began = time.perf_counter()
        results[name] = measure(bench, init)
        seconds[name] = time.perf_counter() - began
    table = Table("", *columns, title=f"held-out loss; base {base:.4f}")
    for row in ROWS:
        table.add_row(row, *(f"{results[name][row]:.4f}" for name in columns))
    Console(width=120).print(table)
    if output is not None:
        record = {"base": base, "steps": steps, "loss": results, "seconds": seconds}
        record["versions"] = {"peft": peft.__version__, "torch": torch.__version__}
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
