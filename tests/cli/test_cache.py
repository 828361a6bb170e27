"""`tether cache`: looking after the anchors that are kept."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

from tether.cache import AnchorCache, Entry, Key
from tether.cli.cache import parse_size, size_text
from tether.errors import ConfigError
from tether.fingerprints import fingerprint_tensor
from tether.methods.olora import OLoRA
from tether.value import Factors

from .conftest import contents, invoke, start, succeed, succeed_json

NOW = 1_700_000_000


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache's folder, missing at first."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    monkeypatch.delenv("TETHER_NO_CACHE")
    return tmp_path / "anchors"


@pytest.fixture
def paths(folder):
    """Three entries, the first used last."""
    origin = fingerprint_tensor(torch.ones(4, 3))
    key = Key.of(origin.sha256, origin.shape, origin.dtype, "linear", OLoRA(), 0)
    found = []
    for rank in (1, 2, 3):
        factors = Factors(torch.ones(rank, 3), torch.ones(4, rank))
        assert AnchorCache(folder).store(key, Entry(factors, 1.0, origin))
        found.append(folder / key.name[:2] / key.name / f"r{rank}-s1.0.safetensors")
        os.utime(found[-1], (NOW - rank, NOW - rank))
    return found


def words(text: str) -> str:
    return " ".join(text.split())


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_info(folder, paths):
    said = succeed_json("cache", "info")
    times = [datetime.fromisoformat(said.pop(name)).timestamp() for name in ("oldest", "newest")]
    assert times == [NOW - 3, NOW - 1]
    assert said == {"folder": str(folder), "enabled": True, "entries": 3, "bytes": size(paths)}
    said = succeed("cache", "info")
    assert str(folder) in "".join(said.split())
    assert size_text(size(paths)) in said
    assert "TETHER_NO_CACHE=1 switches the cache off" in said


def test_info_says_when_it_is_switched_off(folder, monkeypatch):
    monkeypatch.setenv("TETHER_NO_CACHE", "1")
    assert succeed_json("cache", "info")["enabled"] is False
    assert "Switched off: TETHER_NO_CACHE is set." in succeed("cache", "info")


def test_a_missing_cache_is_normal(folder):
    assert succeed_json("cache", "info") == {
        "folder": str(folder),
        "enabled": True,
        "entries": 0,
        "bytes": 0,
        "oldest": None,
        "newest": None,
    }
    assert "last used" not in succeed("cache", "info")
    assert succeed_json("cache", "verify")["checked"] == 0
    assert succeed_json("cache", "prune", "--max-size", "0")["removed"] == 0
    assert not folder.exists()


def test_verify(folder, paths):
    before = contents(folder)
    assert f"checked 3 anchors in {folder}: 0 damaged" in words(succeed("cache", "verify"))
    assert succeed_json("cache", "verify") == {
        "folder": str(folder),
        "checked": 3,
        "bad": [],
        "left": 0,
    }
    assert contents(folder) == before


def test_verify_fails_for_what_it_leaves_and_not_for_what_it_removed(folder, paths):
    paths[1].write_bytes(b"damaged")
    before = contents(folder)
    result = invoke("cache", "verify")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "1 damaged, 0 removed; --remove removes them" in words(result.stdout)
    assert "too few for a safetensors file" in words(result.stdout)
    result = invoke("cache", "verify", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["left"] == 1
    assert [(bad["path"], bad["removed"]) for bad in said["bad"]] == [(str(paths[1]), False)]
    assert contents(folder) == before
    said = words(succeed("cache", "verify", "--remove"))
    assert "checked 3 anchors" in said
    assert "1 damaged, 1 removed" in said
    assert "--remove" not in said
    assert [path.exists() for path in paths] == [True, False, True]


def test_prune(folder, paths):
    freed, left = size(paths[1:]), size(paths[:1])
    said = words(succeed("cache", "prune", "--max-size", f"{left / 1000}kB"))
    assert (
        f"removed 2 anchors, {size_text(freed)}; 1 anchor, {size_text(left)}, left in {folder}"
        in said
    )
    assert [path.exists() for path in paths] == [True, False, False]
    assert succeed_json("cache", "prune", "--max-size", "0") == {
        "folder": str(folder),
        "max_size": 0,
        "removed": 1,
        "freed": left,
        "entries": 0,
        "bytes": 0,
        "failed": [],
    }
    assert list(folder.iterdir()) == []


def test_prune_fails_for_what_it_cannot_remove(folder, paths, monkeypatch):
    def refused(path: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    result = invoke("cache", "prune", "--max-size", "0")
    assert result.exit_code == 1
    assert result.stdout.count("Permission denied") == 3
    assert "removed 0 anchors" in words(result.stdout)


def test_only_the_anchors_are_pruned(folder, paths):
    # The default model lies beside them.
    model = folder.parent / "SmolLM2-135M-Instruct" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"model")
    succeed("cache", "prune", "--max-size", "0")
    assert set(contents(folder.parent)) == {
        "anchors",
        "SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct/model.safetensors",
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *(("0", 0), ("12", 12), ("12B", 12), ("1kB", 1000), ("1KB", 1000), ("500 MB", 500 * 10**6)),
        *(("2GB", 2 * 10**9), ("8.2gb", 8_200_000_000), ("1TB", 10**12), ("1KiB", 1024)),
        *(("1.5GiB", 3 * 2**29), ("1MiB", 2**20), ("1tib", 2**40), (" 2GB ", 2 * 10**9)),
    ],
)
def test_sizes(text, wanted):
    assert parse_size(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "2XB", "2G", "1,5GB", "1e9", "nan", "2GB3", "١GB", "9" * 400, "2  GB"],
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match=r"is not a size.*such as 2GB, 500MB, 1\.5GiB or 0\."):
        parse_size(text)


def test_a_wrong_size_is_one_line_and_removes_nothing(paths):
    result = invoke("cache", "prune", "--max-size", "2 gigs", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "ConfigError"
    assert result.stderr.startswith("error: ConfigError: --max-size '2 gigs' is not a size.")
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5 * 10**12, "5.0 TB")],
)
def test_sizes_as_people_read_them(number, wanted):
    assert size_text(number) == wanted


def test_an_unreadable_cache_is_one_line(folder):
    folder.write_text("a file")
    for command in (["info"], ["verify"], ["prune", "--max-size", "0"]):
        result = invoke("cache", *command)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ConfigError:")
        assert "cannot be read: Not a directory" in result.stderr


def test_in_a_process_of_its_own(folder, paths):
    paths[0].write_bytes(b"damaged")
    process = start("cache", "verify")
    out, err = process.communicate()
    assert (process.returncode, err) == (1, "")
    assert "1 damaged" in out
