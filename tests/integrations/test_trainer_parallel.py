"""Two processes (DDP, gloo): one writes, or one on each node, and both resume bit for bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tether
from tether.errors import DistributedError

from .trainer_runs import STATE, equal, make_trainer

PROGRAM = Path(__file__).parent / "parallel_run.py"


def results(folders, local_ranks, mode):
    """What each rank printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank, (folder, local) in enumerate(zip(folders, local_ranks, strict=True)):
        place = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 2, "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
        child = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {name: str(value) for name, value in place.items()},
        )
        children.append(child)
    found = []
    for child in children:
        out, error = child.communicate(timeout=120)
        assert child.returncode == 0, error
        line = next(line for line in out.splitlines() if line.startswith("result "))
        found.append(json.loads(line.removeprefix("result ")))
    return found


def cannot_go_on_alone(folder, model):
    """One process refuses the checkpoints of two, and nothing has changed then."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    handle = tether.attach(model, tether.LoraConfig(rank=2, dropout=0.1))
    start = handle.snapshot()
    trainer = make_trainer(model, folder)
    with pytest.raises(DistributedError, match="checkpoint of 2 processes, and here is 1"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert equal(start, handle.snapshot())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one", "each"])
def test_two_processes_save_and_resume(tmp_path, mode, tiny_llama):
    each = mode == "each"
    # Two nodes have a disk each, and a first process each.
    folders = [tmp_path / "first", tmp_path / "second"] if each else [tmp_path / "shared"] * 2
    ranks = results(folders, [0, 0] if each else [0, 1], mode)
    for rank, (whole, again, files, found) in enumerate(ranks):
        assert whole == again
        assert len(whole[0]) == 4
        assert found == ["checkpoint-2", "checkpoint-4", "lora"]
        random = {f"rng_state_{n}.pth" for n in ([rank] if each else [0, 1])}
        state = set(STATE) - {"rng_state.pth"}
        assert set(files) == {"adapter.safetensors", "lora"} | state | random
    assert ranks[0][0] == ranks[1][0]
    cannot_go_on_alone(folders[-1], tiny_llama(num_hidden_layers=1, num_key_value_heads=2))
