"""Sites shared out over two real processes: the same adapter on both, and nobody waits in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tether
from tether.config import plan
from tether.ranks import world_size
from tether.start import ranks
from tether.start.site import Job

from . import on_ranks
from .cases import everything
from .on_ranks import BAD, CONFIG, SHAPES, stack

PATHS = [str(index) for index in range(len(SHAPES))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks left behind, started by torchrun as users do."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, on_ranks.__file__, str(folder)],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def said(folder) -> list[dict[str, Any]]:
    """What each rank saw, case by case."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def adapters(folder: Path, case: str) -> list[dict[str, Any]]:
    return [everything(tether.load(folder / f"{case}-{rank}.safetensors")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The adapter of a single process."""
    return everything(tether.init(stack(), CONFIG))


@pytest.mark.parametrize("case", ["plain", "first", "second", "threads", "after all"])
def test_every_rank_has_the_adapter_of_a_single_process(case, folder, expected):
    assert adapters(folder, case) == [expected, expected]


@pytest.mark.parametrize("case", ["plain", "first", "threads", "after all"])
def test_each_rank_finds_its_own_part(case, said):
    calls = [rank[case]["calls"] for rank in said]
    assert sorted(calls[0] + calls[1]) == PATHS
    assert min(map(len, calls)) >= 2
    assert [rank[case]["cached"] for rank in said] == [0, 0]


def test_what_one_rank_cached_both_count(said):
    # The last is too small to be cached.
    assert sorted(said[0]["second"]["calls"] + said[1]["second"]["calls"]) == PATHS[-1:]
    assert [rank["second"]["cached"] for rank in said] == [len(PATHS) - 1] * 2


def test_a_rank_may_have_nothing_to_do(said, folder):
    assert [rank["one site"]["calls"] for rank in said] == [["0"], []]
    alone = everything(tether.init(stack(((128, 128),)), CONFIG))
    assert adapters(folder, "one site") == [alone, alone]


@pytest.mark.parametrize("case", ["configurations", "seeds", "models", "weights"])
def test_ranks_that_want_different_starts_are_told_so(case, said):
    for rank, other in ((0, 1), (1, 0)):
        assert said[rank][case]["error"] == "DistributedError"
        message = said[rank][case]["message"]
        assert message.startswith(
            f"rank {rank} wants starts for other sites, settings or weights ("
        )
        assert f"than rank {other} (" in message
        assert message.endswith("the same model and configuration, or distributed=False.")
        assert not said[rank][case]["calls"]


FAILURES = {
    # case: the rank that fails, how, and the beginning of what it says
    "rank too large": (1, "RankTooLargeError", "site '0': rank 129 exceeds min(shape) 128"),
    "workers": (0, "ConfigError", "workers must be a whole number, at least 1, not 0."),
    "no folder": (0, "ModelError", "{folder}/none: is not a folder."),
}


@pytest.mark.parametrize("case", FAILURES)
def test_where_one_rank_cannot_begin_the_others_do_not_wait(case, said, folder):
    rank, error, words = FAILURES[case]
    failed, other = said[rank][case], said[1 - rank][case]
    assert failed["error"] == error
    assert words.format(folder=folder) in failed["message"]
    assert other["error"] == "DistributedError"
    assert other["message"] == (
        f"rank {rank} failed, so this one has no start: {error}: {failed['message']}"
    )
    assert not failed["calls"] + other["calls"]


def test_where_one_rank_fails_the_others_say_which_and_why(said):
    errors = [rank["nan"]["error"] for rank in said]
    assert sorted(errors) == ["DistributedError", "NonFiniteError"]
    rank = errors.index("NonFiniteError")
    message = said[rank]["nan"]["message"]
    assert message.startswith(f"site '{BAD}': weight (128, 128): 1 of 16384 values are NaN")
    assert said[1 - rank]["nan"]["message"] == (
        f"rank {rank} failed, so this one has no start: NonFiniteError: {message}"
    )


def test_one_rank_may_work_alone(said, folder, expected):
    assert [rank["alone"]["calls"] for rank in said] == [[], PATHS]
    assert not (folder / "alone-0.safetensors").exists()
    assert everything(tether.load(folder / "alone-1.safetensors")) == expected


@pytest.mark.parametrize("size", [2, 3, 8, 16])
@pytest.mark.parametrize("rank", [16, 256])
def test_the_work_on_a_llama_is_shared_out_evenly(size, rank):
    """The shapes of Llama-3.1-8B."""
    settings = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = transformers.LlamaModel(
            transformers.LlamaConfig(num_hidden_layers=32, vocab_size=8, **settings)
        )
    jobs = [Job(each, torch.empty) for each in plan(model, tether.LoraConfig(rank=rank))]
    parts = [ranks._part(jobs, each, size) for each in range(size)]
    assert sorted(job.path for part in parts for job in part) == sorted(job.path for job in jobs)
    loads = [sum(job.cost for job in part) for part in parts]
    # The largest is at most a hundredth above the mean.
    assert max(loads) <= 1.01 * sum(loads) / size


def test_a_single_process_has_nobody_to_share_with(mesh):
    assert world_size() == 1
    adapter = tether.init(stack(), CONFIG)
    torch.distributed.barrier()
    assert list(adapter.layers) == PATHS
