"""`tether convert` of a residual adapter: its peak memory on a large base, and its speed.

Memory: a base of 2.1 GB in shards and its residual model are made in a temporary folder; then
`tether convert --residual --base` runs in a process of its own, and the same on a tiny base, which
tells what interpreter and libraries take. The difference is asserted to stay below a few sites.

Speed: a PiSSA checkpoint of SmolLM2-135M, rank 16, all linear layers; `tether convert --anchor`
beside peft's save_pretrained(…, path_initial_model_for_weight_conversion=…) with the model that it
needs, each in a process of its own, from its start to its end.

    python benchmarks/convert_rescue.py [--part memory|speed] [--output FILE]
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

import tether
from tether.algebra import relative_error
from tether.integrations import smollm2

MIB = 2**20
SITES_ALLOWED = 4.0  # peak above the baseline, in float32 copies of the largest weight
RATIO_WANTED = 10.0
RANK = 16
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Size:
    """A Llama-like model: layers, width, width inside the MLP."""

    layers: int
    hidden: int
    inner: int

    def sites(self, layer: int) -> dict[str, tuple[int, int]]:
        h, i = self.hidden, self.inner
        shapes = {"q": (h, h), "k": (h, h), "v": (h, h), "o": (h, h)}
        shapes |= {"gate": (i, h), "up": (i, h), "down": (h, i)}
        return {f"model.layers.{layer}.{name}_proj": shape for name, shape in shapes.items()}


def make(root: Path, size: Size) -> int:
    """Base and residual in bfloat16, one shard a layer, and the adapter; bytes of the base."""
    g = torch.Generator().manual_seed(0)
    adapter, total = {}, 0
    index: dict[str, str] = {}
    for name in ("base", "residual", "adapter"):
        (root / name).mkdir(parents=True)
    for layer in range(size.layers):
        shard = f"model-{layer + 1:05}-of-{size.layers:05}.safetensors"
        base, residual = {}, {}
        for site, (rows, columns) in size.sites(layer).items():
            weight = (0.02 * torch.randn(rows, columns, generator=g)).bfloat16()
            b, a = (0.1 * torch.randn(s, generator=g) for s in ((rows, RANK), (RANK, columns)))
            base[f"{site}.weight"] = weight
            residual[f"{site}.weight"] = (weight.float() - b @ a).bfloat16()
            for side, factor in (("A", a), ("B", b)):
                moved = factor + 1e-3 * torch.randn(factor.shape, generator=g)
                adapter[f"{PREFIX}{site}.lora_{side}.weight"] = moved
            index[f"{site}.weight"] = shard
            total += weight.nbytes
        save_file(base, root / "base" / shard)
        save_file(residual, root / "residual" / shard)
    for name in ("base", "residual"):
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (root / name / "model.safetensors.index.json").write_text(text)
    save_file(adapter, root / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": "lora_ga"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return total


def peaks(*arguments: object) -> dict[str, float]:
    """Run tether; its peak of all resident memory and of what is its own, in MiB, and seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tether", *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    found = {"VmHWM": 0.0, "RssAnon": 0.0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in found:
                found[name] = max(found[name], int(value.split()[0]) / 1024)
        time.sleep(0.002)
    if process.wait() != 0:
        raise SystemExit("tether convert failed")
    return found | {"seconds": time.perf_counter() - began}


def memory() -> dict[str, object]:
    """Peak memory above that of a tiny conversion, in sites."""
    sizes = {"tiny": Size(1, 64, 96), "large": Size(5, 4096, 11008)}
    result: dict[str, object] = {}
    seen = {}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            total = make(root, size)
            for target in ("out.safetensors", "out"):
                given = ("--residual", root / "residual", "--base", root / "base")
                seen[name, target] = peaks("convert", root / "adapter", root / target, *given)
            result["base bytes"] = total
    site = 4 * sizes["large"].hidden * sizes["large"].inner / MIB
    result["one site, MiB in float32"] = site
    for target in ("out.safetensors", "out"):
        tiny, large = seen["tiny", target], seen["large", target]
        above = {key: (large[key] - tiny[key]) / site for key in ("VmHWM", "RssAnon")}
        kind = "native" if target != "out" else "folder"
        result[kind] = {"baseline MiB": tiny, "peak MiB": large, "above, in sites": above}
        for key, value in above.items():
            assert value <= SITES_ALLOWED, f"{kind}: {key} is {value:.1f} sites above the baseline"
    assert int(result["base bytes"]) >= 2 * 10**9
    return result


PEFT = """
import sys, torch, peft, transformers
base, adapter, start, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter)
model.save_pretrained(out, path_initial_model_for_weight_conversion=start)
"""
START = """
import sys, torch, peft, transformers
base, adapter, start = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
config = peft.LoraConfig(
    init_lora_weights="pissa", r=16, lora_alpha=16, target_modules="all-linear",
    task_type="CAUSAL_LM",
)
model = peft.get_peft_model(model, config)
model.save_pretrained(start)
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data += 1e-3 * torch.randn_like(parameter)
model.save_pretrained(adapter)
"""


def timed(*arguments: object) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def speed() -> dict[str, object]:
    """Seconds of both ways, and their ratio."""
    base = smollm2.folder()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        adapter, start = root / "adapter", root / "start"
        timed("-c", START, base, adapter, start)
        convert = ("-m", "tether", "convert", adapter)
        ours = min(timed(*convert, root / f"ours{i}", "--anchor", start) for i in range(3))
        theirs = timed("-c", PEFT, base, adapter, start, root / "theirs")
        mine, other = tether.load(root / "ours0"), tether.load(root / "theirs")
        difference = max(relative_error(mine.layers[s], other.layers[s]) for s in mine.layers)
    ratio = theirs / ours
    result = {"peft s": theirs, "tether s": ours, "ratio": ratio, "largest difference": difference}
    return result | {"wanted": RATIO_WANTED, "met": ratio >= RATIO_WANTED}


def main(part: str = "", output: Path | None = None) -> None:
    """Measure, print, and write the figures as JSON if asked."""
    parts = {"memory": memory, "speed": speed}
    result = {name: measure() for name, measure in parts.items() if part in ("", name)}
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
