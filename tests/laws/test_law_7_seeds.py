"""Law 7: the same seed gives the same bits, whatever else there is."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import tether
from laws.cases import DTYPES, FAMILIES, Case, bits, factors_of, law
from tether import methods


def values(adapter: tether.Adapter, path: str) -> list[bytes]:
    return [bits(t) for name, t in factors_of(adapter).items() if name.startswith(path + ".")]


@law()
def test_same_seed_same_bits_whatever_the_other_sites_and_generators(case):
    model, config = case.model(), case.config()
    adapter = tether.init(model, config)
    torch.rand(3)
    turned = nn.ModuleDict({"embedding": model.embedding, "linear": model.linear})
    others = [
        tether.init(model, config),
        tether.init(turned, config),
        tether.init(model, case.config(target_modules=["linear"])),
        tether.attach(case.model(), config).snapshot(),
    ]
    for other in others:
        assert values(other, "linear") == values(adapter, "linear")
    # Two sites have their own random numbers, and another seed has others.
    if not methods.get(case.method).lifts:
        other = tether.init(model, case.config(seed=case.seed + 1))
        assert values(other, "linear") != values(adapter, "linear")
        a = [adapter.layers[path].trainable.A.flatten() for path in ("linear", "embedding")]
        length = min(map(len, a))
        assert not torch.equal(a[0][:length], a[1][:length])


def digest() -> str:
    """sha256 of the start of every method, dtype and family."""
    result = hashlib.sha256()
    for method in methods.names():
        for dtype in DTYPES:
            for family in FAMILIES:
                case = Case(method, dtype, family, 5, 1, 1.0, False, 0.0, 1.0)
                for tensor in factors_of(tether.init(case.model(), case.config())).values():
                    result.update(bits(tensor))
    return result.hexdigest()


def test_another_process_starts_with_the_same_bits():
    folders = (str(Path(__file__).parent), str(Path(__file__).parents[1]))
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    code = "import test_law_7_seeds; print(test_law_7_seeds.digest())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest()
