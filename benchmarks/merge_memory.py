"""How much memory `tether merge` takes, on a sharded base of more than 2 GB made on the spot.

A Llama of 4096-wide layers in bfloat16 and an adapter on all its linear layers and its head are
written to a temporary folder, then merged in a process of its own, fingerprints checked. Printed
is the peak above a process that has imported torch and tether: of everything resident (VmHWM) and
of what is not backed by a file (RssAnon). Asserted is

    peak - bytes of the adapter  <=  1.25 x bytes of the largest tensor

once the tensor, which is read and changed in place; a quarter of it for the blocks of 2^18 values
in which the sums are made, in float32 and float64, for pages of the libraries that are touched
first here, and for what the allocator keeps. The adapter is read whole before the first tensor.

    python benchmarks/merge_memory.py [--layers 4] [--folder TMP] [--json]
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tether
from tether.checkpoint import Checkpoint
from tether.fingerprints import fingerprint_tensor
from tether.merged import save_merged
from tether.stream import TensorWriter
from tether.value import Adapter, Factors, LayerAdapter, Layout

WIDTH, INNER, VOCABULARY, RANK = 4096, 11008, 32000, 16
DTYPE = torch.bfloat16
MIB = 2**20


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: the embeddings, then a layer each."""
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (VOCABULARY, WIDTH),
            "lm_head.weight": (VOCABULARY, WIDTH),
            "model.norm.weight": (WIDTH,),
        }
    ]
    for number in range(layers):
        layer = f"model.layers.{number}"
        attention = {f"{layer}.self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        mlp = {f"{layer}.mlp.{n}_proj.weight": (INNER, WIDTH) for n in ("gate", "up")}
        norms = {f"{layer}.{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
        down = {f"{layer}.mlp.down_proj.weight": (WIDTH, INNER)}
        shards.append(attention | mlp | down | norms)
    return shards


def make(folder: Path, layers: int) -> tuple[Path, Path]:
    """Write base and adapter, one tensor in memory at a time."""
    base, adapter = folder / "base", folder / "adapter.safetensors"
    base.mkdir()
    listed, sites, prints, size = {}, {}, {}, 0
    shards = shapes(layers)
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        specs = {name: (DTYPE, shape) for name, shape in tensors.items()}
        with TensorWriter(base / file, specs, 32) as writer:
            for name, shape in tensors.items():
                tensor = torch.randn(shape).mul_(0.02).to(DTYPE)
                writer.write(name, tensor)
                listed[name], size = file, size + tensor.nbytes
                path = name.removesuffix(".weight")
                if len(shape) == 2 and "embed" not in path:
                    sites[path], prints[path] = site(shape), fingerprint_tensor(tensor)
            writer.finish({"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": listed}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH}
    config |= {"intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": 32, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    provenance = tether.Provenance("pissa", tether_version="0", fingerprints=prints)
    tether.save(Adapter(sites, provenance), adapter)
    return base, adapter


def site(shape: tuple[int, ...]) -> LayerAdapter:
    """An anchored site after some training."""
    a, b = (RANK, shape[1]), (shape[0], RANK)
    anchor = Factors(torch.randn(a) * 0.1, torch.randn(b) * 0.1)
    moved = Factors(torch.randn(a) * 0.01, torch.randn(b) * 0.01)
    return LayerAdapter(moved, anchor, 1.0, Layout("linear", shape))


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def watched(peak: dict[str, int]) -> Iterator[None]:
    """Look every millisecond at what is not backed by a file; the kernel keeps the other peak."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            peak["anonymous"] = max(peak["anonymous"], memory("RssAnon"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def child(base: Path, adapter: Path, out: Path) -> None:
    """Merge, and print how much memory it took above what was there before."""
    resident, anonymous = memory("VmRSS"), memory("RssAnon")
    # Reset the kernel's own record of the peak: importing may have passed it.
    Path("/proc/self/clear_refs").write_text("5")
    peak, start = {"anonymous": anonymous}, time.perf_counter()
    with watched(peak):
        save_merged(base, tether.load(adapter), out)
    seconds = time.perf_counter() - start
    result = {
        "before": resident,
        "peak": memory("VmHWM") - resident,
        "peak_anonymous": peak["anonymous"] - anonymous,
        "seconds": seconds,
    }
    print(json.dumps(result))


def measure(folder: Path, layers: int) -> dict[str, Any]:
    """Make, merge in a process of its own, look at the result."""
    base, adapter = make(folder, layers)
    command = [sys.executable, __file__, "--child", str(base), str(adapter), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    here, merged = Checkpoint.open(base), Checkpoint.open(folder / "out")
    assert set(here.names) == set(merged.names)
    sizes = [torch.Size(here.shape(name)).numel() * DTYPE.itemsize for name in here.names]
    result |= {"model": sum(sizes), "largest": max(sizes), "adapter": adapter.stat().st_size}
    result["allowed"] = int(1.25 * result["largest"]) + result["adapter"]
    return result


def main(
    layers: Annotated[int, typer.Option(help="Of the base; 0.4 GB each.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="For 5 GB of temporary files.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(2)
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        result = measure(place, layers)
    finally:
        shutil.rmtree(place)
    assert result["model"] > 2e9, "the base must be larger than 2 GB"
    if json_:
        print(json.dumps(result, indent=2))
    else:
        rows = ("model", "largest", "adapter", "before", "peak", "peak_anonymous", "allowed")
        for row in rows:
            print(f"{row:>15} {result[row] / MIB:8.0f} MiB")
        print(f"{'seconds':>15} {result['seconds']:8.1f}")
        above = result["peak"] - result["adapter"]
        print(f"{above / result['largest']:.2f} x the largest tensor, without the adapter")
        print(f"{result['model'] / result['peak']:.1f} x smaller than the model")
    assert result["peak"] <= result["allowed"], "more memory than one site explains"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(Path, sys.argv[2:]))
    else:
        typer.run(main)
