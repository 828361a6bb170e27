"""The command line, called in this process or in one of its own, and a finished run to use."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tether.cli import app
from tiny_model import model_folder, one_core, text_file

__all__ = ["model_folder", "one_core", "text_file"]

# The held-out part is a tenth of 100 blocks.
DATA = ("--block", "16", "--eval-limit", "8", "--batch-size", "2")
SHORT = (*DATA, "--rank", "2", "--lr", "0.01")


def invoke(*arguments: object) -> Result:
    """Call tether in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """What tether prints; nothing may have gone wrong."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def succeed_json(*arguments: object) -> dict[str, Any]:
    """The one JSON object that tether prints, and no word beside it."""
    result = invoke(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start tether in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tether", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="session")
def finished(
    model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of 12 steps, and what `train --json` said; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    options = ("--out", out, "--steps", "12", *SHORT)
    return out, succeed_json("train", model_folder, "--data", text_file, *options)
