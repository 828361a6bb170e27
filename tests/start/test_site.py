"""One site's start, out of the cache or into it."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tether
from tether import cache, methods
from tether.methods.milora import MiLoRA
from tether.methods.olora import OLoRA
from tether.methods.pissa import PiSSA
from tether.start import Search, find, seed_for
from tether.value import Adapter

from .cases import CACHED, SHAPES, config, counting, everything, found, stack, tensors

METHODS = {"pissa": PiSSA, "olora": OLoRA, "milora": MiLoRA}
anchored = pytest.mark.parametrize("init", METHODS)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def products(adapter: Adapter) -> dict[str, Tensor]:
    """The anchors' products, which do not depend on the signs of singular vectors."""
    return {
        path: layer.scaling * layer.anchor.B.double() @ layer.anchor.A.double()
        for path, layer in adapter.layers.items()
    }


@anchored
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_found_once_comes_out_of_the_cache_bit_for_bit(init, dora, workers, anchors):
    wanted = config(init, use_dora=dora, alpha=3)
    alone = tether.init(stack(), wanted, cache=False)
    with counting(METHODS[init]) as calls:
        first = found(wanted, workers=workers)
    assert (first.cached, set(calls.values()), len(calls)) == (0, {1}, len(SHAPES))
    assert len(files(anchors)) == CACHED
    with counting(METHODS[init]) as calls:
        second = found(wanted, workers=workers)
    assert (second.cached, dict(calls)) == (CACHED, {"3": 1})
    assert len(files(anchors)) == CACHED
    assert everything(first.adapter) == everything(second.adapter) == everything(alone)
    for _, tensor in tensors(second.adapter):
        assert (tensor.dtype, tensor.is_contiguous()) == (torch.float32, True)


def test_without_a_cache_nothing_is_read_or_written(anchors, monkeypatch):
    assert found(config(), cache=False).cached == 0
    assert not anchors.exists()
    monkeypatch.setenv("TETHER_NO_CACHE", "1")
    assert found(config()).cached == 0
    assert not anchors.exists()
    monkeypatch.setenv("TETHER_NO_CACHE", "")
    found(config())
    before = {path: path.read_bytes() for path in files(anchors)}
    assert len(before) == CACHED
    assert found(config(), cache=False).cached == 0
    monkeypatch.setenv("TETHER_NO_CACHE", "1")
    assert found(config()).cached == 0
    assert {path: path.read_bytes() for path in files(anchors)} == before


@anchored
def test_a_smaller_rank_is_cut_from_a_larger_one(init, anchors):
    found(config(init, rank=9, alpha=2))
    wanted = config(init, rank=4, alpha=7)
    cut = found(wanted)
    assert cut.cached == CACHED
    fresh = products(tether.init(stack(), wanted, cache=False))
    for path, product in products(cut.adapter).items():
        # Float32 factors whose pairs may be mixed within the certificate, 1e-5 of the product.
        # MiLoRA's triplets are small, and as exact as the whole weight is.
        weight = stack().get_submodule(path).weight.detach().double()
        scale = weight.norm() if init == "milora" else fresh[path].norm()
        assert float((product - fresh[path]).norm() / scale) < 1e-5
    # Certificates are of the rank that they were found with.
    assert set(cut.adapter.provenance.certificates) == ({"3"} if init == "pissa" else set())
    assert len(files(anchors)) == CACHED
    assert found(config(init, rank=10)).cached == 0


def test_another_seed_finds_the_starts_of_methods_that_draw_nothing(anchors):
    found(config(seed=1))
    other = found(config(seed=2))
    assert (other.cached, other.adapter.provenance.seed) == (CACHED, 2)


@pytest.mark.parametrize(
    "other",
    [
        config(PiSSA(tolerance=1e-4)),
        config(PiSSA(criterion="excess")),
        config("olora"),
        config("milora"),
        config(rank=6),
    ],
    ids=["tolerance", "criterion", "olora", "milora", "rank"],
)
def test_other_settings_find_nothing(other, anchors):
    found(config())
    assert found(other).cached == 0


def test_another_weight_or_dtype_finds_nothing(anchors):
    found(config())
    changed = stack()
    with torch.no_grad():
        changed[0].weight[3, 4] += 1e-6
    assert find(changed, config(), Search()).cached == CACHED - 1
    assert find(stack().bfloat16(), config(), Search()).cached == 0
    assert found(config(), seed=1).cached == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_cached_with_its_fingerprint(dtype, anchors):
    model = stack().to(dtype)
    first, second = (find(model, config(use_dora=True), Search()) for _ in range(2))
    assert second.cached == CACHED
    assert everything(first.adapter) == everything(second.adapter)
    whole = tether.fingerprint(model)
    for path, fingerprint in second.adapter.provenance.fingerprints.items():
        assert fingerprint == whole[f"{path}.weight"]


@pytest.mark.parametrize("init", [n for n in methods.names() if not methods.get(n).lifts])
def test_starts_that_take_nothing_from_the_weight_are_not_cached(init, anchors):
    assert [found(config(init)).cached for _ in range(2)] == [0, 0]
    assert not anchors.exists()


def test_weights_of_fewer_values_than_two_to_the_fourteenth_are_not_cached(anchors):
    model = stack(((128, 127), (128, 128)))
    assert [find(model, config(), Search()).cached for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("damage", [b"", b"no entry of ours", None])
def test_a_damaged_entry_is_found_again_and_replaced(damage, anchors):
    first = found(config())
    entry = files(anchors)[0]
    good = entry.read_bytes()
    entry.write_bytes(bytes([*good[:-1], good[-1] ^ 1]) if damage is None else damage)
    again = found(config())
    assert again.cached == CACHED - 1
    assert everything(again.adapter) == everything(first.adapter)
    assert cache.verify(anchors).bad == ()
    assert found(config()).cached == CACHED


def test_a_folder_that_cannot_be_written_is_one_warning(anchors):
    anchors.parent.mkdir()
    anchors.write_text("a file in its place")
    alone = tether.init(stack(), config(), cache=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [found(config(), workers=workers) for workers in (1, 3)]
    (warning,) = caught
    assert warning.category is UserWarning
    assert f"anchors are not kept in {anchors}" in str(warning.message)
    assert "TETHER_NO_CACHE=1 switches the cache off" in str(warning.message)
    for result in results:
        assert (result.cached, everything(result.adapter)) == (0, everything(alone))


@anchored
def test_certificates_are_in_the_provenance_and_the_file(init, anchors, tmp_path):
    for _ in range(2):
        adapter = found(config(init)).adapter
        certificates = adapter.provenance.certificates
        wanted = ["0", "1", "2", "3"] if init == "pissa" else []
        assert list(certificates) == wanted
        for certificate in certificates.values():
            assert certificate.product_error <= 1e-5
        tether.save(adapter, tmp_path / "a.safetensors")
        loaded = tether.load(tmp_path / "a.safetensors")
        assert loaded.provenance == adapter.provenance
    if init == "pissa":
        assert certificates["2"].route == "gram"
        assert certificates["3"].route == "dense"


def test_a_method_without_an_anchor_has_no_certificates():
    assert not found(config("lora")).adapter.provenance.certificates


def test_every_site_has_a_seed_of_its_own():
    seeds = {seed_for(seed, path) for seed in (0, 1) for path in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


# Both wait for each other, so that they look the same anchors up at the same time.
SCRIPT = """
import sys, time
from pathlib import Path
from safetensors.torch import load_file
from torch import nn
import tether
me, other, weights, out = sys.argv[1:]
model = nn.ModuleList()
for weight in load_file(weights).values():
    model.append(nn.Linear(*reversed(weight.shape), bias=False))
    model[-1].weight.data = weight
Path(me).touch()
while not Path(other).exists():
    time.sleep(0.001)
tether.save(tether.init(model, tether.LoraConfig(rank=5)), out)
"""


def test_two_processes_may_fill_one_cache(anchors, tmp_path):
    weights = str(tmp_path / "weights.safetensors")
    save_file({path: layer.weight.data for path, layer in stack().named_children()}, weights)
    marks = (str(tmp_path / "one"), str(tmp_path / "two"))
    outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, *order, weights, str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for order, out in zip((marks, marks[::-1]), outs, strict=True)
    ]
    for process in running:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    expected = everything(found(config(), cache=False).adapter)
    for out in outs:
        assert everything(tether.load(out)) == expected
    verified = cache.verify(anchors)
    assert (verified.checked, verified.bad) == (CACHED, ())
    assert found(config()).cached == CACHED
