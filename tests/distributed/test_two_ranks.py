"""DDP and FSDP2 on two real processes beside one: the same losses, the base untouched, one file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import on_two
import pytest
import small_runs
from beside import ADAPTER
from small_runs import MIDDLE, STEPS, VARIANTS, WHOLE, Variant

import tether

RUNS = {name: (mode, variant) for name, mode, variant in on_two.runs()}
FULL = [name for name, (_, variant) in RUNS.items() if not variant.half]
SHARDED = [name for name, (mode, _) in RUNS.items() if mode == "fsdp"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing\w*` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks left behind, started by torchrun as users do; and one process before them."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = small_runs.make_model(WHOLE)
    handle = small_runs.attach(alone, WHOLE)
    optimizer = small_runs.make_optimizer(handle)
    small_runs.train(alone, optimizer, 0, MIDDLE)
    small_runs.keep(alone, handle, optimizer, folder / "alone")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, on_two.__file__, str(folder)],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each rank saw, case by case."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def said(ranks):
    """What each rank saw in a case."""

    def of(case: str) -> list[dict[str, Any]]:
        both = [rank[case] for rank in ranks]
        failed = [f"rank {n}: {each['failed']}" for n, each in enumerate(both) if "failed" in each]
        assert not failed, "\n".join(failed)
        return both

    return of


_ALONE: dict[str, tuple[list[float], tether.Adapter]] = {}


def alone(variant: Variant) -> tuple[list[float], tether.Adapter]:
    """The losses of one process, and its adapter."""
    key = repr(variant.lora | variant.llama)
    if key not in _ALONE:
        model = small_runs.make_model(variant)
        handle = small_runs.attach(model, variant)
        losses = small_runs.train(model, small_runs.make_optimizer(handle))
        _ALONE[key] = losses, handle.snapshot()
    return _ALONE[key]


def test_every_case_was_run(ranks):
    assert [list(rank) for rank in ranks] == [list(on_two.cases())] * 2


@pytest.mark.parametrize("name", FULL)
def test_every_step_is_that_of_one_process(name, said, folder):
    losses, adapter = alone(RUNS[name][1])
    for rank in said(name):
        assert rank["moved"]
        assert rank["losses"] == pytest.approx(losses, abs=1e-5, rel=0)
    stored = tether.load(folder / name / ADAPTER)
    # AdamW divides by the size of a gradient: where it is near zero its last bits count.
    assert tether.compare(stored, adapter).error < 1e-4


@pytest.mark.parametrize("name", [name for name in RUNS if name not in FULL])
def test_parameters_gathered_in_bfloat16_are_trained_and_saved_in_float32(name, said, folder):
    losses, adapter = alone(RUNS[name][1])
    for rank in said(name):
        assert rank["moved"]
        # Eight bits of precision in every layer.
        assert rank["losses"] == pytest.approx(losses, rel=1e-2)
    stored = tether.load(folder / name / ADAPTER)
    assert tether.compare(stored, adapter).error < 0.3
    for layer in stored.layers.values():
        assert not layer.trainable.A.equal(layer.trainable.A.bfloat16().float())


@pytest.mark.parametrize("name", RUNS)
def test_the_base_is_untouched_and_at_hand(name, said):
    for rank in said(name):
        assert rank["first"]  # the first loss is the base's, bit for bit
        assert rank["reference"]
        assert rank["disabled"]
        assert rank["base"]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_is_the_adapter(name, said, folder):
    for rank in said(name):
        assert rank["same"]
    stored, again = (tether.load(folder / name / file) for file in (ADAPTER, "again.safetensors"))
    assert tether.compare(stored, again).error < 1e-12
    assert tether.compare(stored, tether.load(folder / name / "lora")).error < 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_saving_gathers_the_adapter_and_never_the_base(name, said):
    saved = RUNS[name][1].lora.get("modules_to_save", ())
    allowed = {f"model.{path}.weight" if path == "norm" else f"{path}.weight" for path in saved}
    for rank in said(name):
        names = rank["gathered"]
        assert {n for n in names if ".tether." not in n} == (allowed if name in SHARDED else set())
        assert any(".tether." in n for n in names) == (name in SHARDED)
        assert all(names.count(n) == 2 for n in names)  # two files


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_resumed_run_is_an_uninterrupted_one(mode, said):
    for rank in said(f"resume {mode}"):
        assert rank["again"] == rank["after"]
        assert rank["same"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(mode, said, folder):
    losses, adapter = alone(WHOLE)
    for rank in said(f"resume {mode}"):
        assert rank["before"] + rank["from one"] == pytest.approx(losses, abs=1e-5, rel=0)
    model, handle, optimizer = small_runs.go_on("one", WHOLE, folder / f"resume {mode}")
    after = small_runs.train(model, optimizer, MIDDLE, STEPS)
    assert after == pytest.approx(losses[MIDDLE:], abs=1e-5, rel=0)
    assert tether.compare(handle.snapshot(), adapter).error < 1e-4


def test_what_a_rank_holds(said):
    replicated, sharded = said("memory ddp"), said("memory fsdp")
    whole = replicated[0]["displacement"]
    for rank in replicated:
        assert (rank["anchor"], rank["displacement"], rank["optimizer"]) == (
            whole,
            whole,
            2 * whole,
        )
    for rank in sharded:
        assert (rank["anchor"], rank["displacement"]) == (whole, whole // 2)
        assert rank["optimizer"] == whole


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_only_the_rank_that_writes_gets_the_values(mode, said):
    first, second = said(f"memory {mode}")
    assert first["gathered"] == first["anchor"] + said("memory ddp")[0]["displacement"]
    assert second["gathered"] == 4 * 4 * 14  # one zero for each of four factors of 14 sites


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_detaching_leaves_the_base(mode, said):
    for rank in said(f"detach {mode}"):
        assert rank["base"]
        assert not rank["attached"]
        assert not rank["kept"]
        if mode == "ddp":
            assert rank["value"] < 1e-12
        else:
            assert rank["report"] == ["detach", "bfloat16", 8, 14]  # the same on both


def test_a_snapshot_between_forward_and_backward_changes_nothing(said):
    for rank in said("between"):
        assert rank["gradients"]
        assert rank["snapshots"] < 1e-12


def test_where_the_first_rank_cannot_write_all_are_told(said, folder):
    first, second = said("writing fails")
    where = folder / "writing fails"
    assert first["save"] == ["WriteError", f"{where}/taken: is a folder; give the name of a file."]
    assert first["lora"][0] == "WriteError"
    assert "holds 'thesis.txt'" in first["lora"][1]
    assert first["rank"][0] == "ConfigError"
    for case in ("save", "lora", "rank"):
        error, message = first[case]
        words = f"rank 0 failed, so nothing was written: {error}: {message}"
        assert second[case] == ["DistributedError", words]
    left = ["adapter.safetensors", "filled", "filled/thesis.txt", "taken"]
    assert first["left"] == second["left"] == left


def test_replicated_adapters_are_saved_by_one_rank_or_by_all(said):
    for rank in said("one rank writes"):
        assert rank == {"same": True, "left": ["all.safetensors", "lora", "one.safetensors"]}


def test_what_a_sharded_adapter_cannot_do_is_said_before_anything_is_written(said):
    for rank in said("refused"):
        for case, name in (("verify", "verify"), ("offload", "after='offload'")):
            error, message = rank[case]
            assert error == "ShardedWeightError"
            assert message.startswith(f"{name}: adapter 'default' is sharded by fully_shard")
        assert not rank["left"]


def test_all_variants_are_run_both_ways():
    assert {f"{mode} {name}" for mode in ("ddp", "fsdp") for name in VARIANTS} <= set(RUNS)
