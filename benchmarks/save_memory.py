"""How much memory saving a live adapter as plain LoRA adds, beside peft's conversion.

Run: python benchmarks/save_memory.py [--width 4096] [--layers 8]

A model of square layers, PiSSA of rank 16 on all of them; each library in a process of its own.
The peak of resident memory is reset just before saving (Linux: /proc/self/clear_refs), so what is
printed is what saving added, as a multiple of one site: its weight's bytes.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn


def model(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def status(field: str) -> int:
    """A value of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def added(save) -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    save()
    return status("VmHWM") - before


def with_tether(width: int, layers: int, out: Path) -> int:
    import tether

    base = model(width, layers)
    handle = tether.attach(base, tether.LoraConfig(init="olora", rank=16, target_modules=["*"]))
    for parameter in handle.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    return added(lambda: tether.save_as_lora(handle, out / "lora"))


def with_peft(width: int, layers: int, out: Path) -> int:
    import peft

    warnings.simplefilter("ignore")
    names = [str(n) for n in range(layers)]
    config = peft.LoraConfig(init_lora_weights="olora", r=16, lora_alpha=16, target_modules=names)
    live = peft.get_peft_model(model(width, layers), config)
    live.save_pretrained(out / "start")
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-3 * torch.randn_like(parameter)
    return added(
        lambda: live.save_pretrained(
            out / "lora", path_initial_model_for_weight_conversion=str(out / "start")
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=("tether", "peft"))
    arguments = parser.parse_args()
    if arguments.only:
        run = {"tether": with_tether, "peft": with_peft}[arguments.only]
        with tempfile.TemporaryDirectory() as folder:
            print(run(arguments.width, arguments.layers, Path(folder)))
        return
    site = arguments.width**2 * 4
    print(f"{arguments.layers} weights of {arguments.width}², {site / 2**20:.0f} MiB each, rank 16")
    found = {}
    for name in ("tether", "peft"):
        command = [sys.executable, __file__, "--only", name]
        command += ["--width", str(arguments.width), "--layers", str(arguments.layers)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(result.stdout)
        print(f"{name}: saving added {found[name] / 2**20:.1f} MiB, {found[name] / site:.3f} sites")
    if found["tether"] >= site:
        sys.exit("tether's save_as_lora added one site's memory or more")


if __name__ == "__main__":
    main()
