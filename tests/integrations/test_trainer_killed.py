"""A run that is killed while it saves leaves complete checkpoints, and goes on from them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "killed_runs.py"


@pytest.mark.slow
def test_a_killed_save_leaves_only_complete_checkpoints(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    assert len(said) == 1, done.stdout
    assert said[0].startswith("killed at ")
