"""Counting, checking and pruning the anchor cache; nothing that is not ours is touched."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tether import cache
from tether.cache import AnchorCache, Entry, Key, upkeep
from tether.errors import ConfigError
from tether.fingerprints import fingerprint_tensor
from tether.methods import Context
from tether.methods.pissa import PiSSA

NOW = 1_700_000_000


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "anchors"


def fill(folder: Path, *times: int) -> list[Path]:
    """One entry of each of several weights, last used at these times."""
    paths = []
    for number, when in enumerate(times, start=1):
        weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
        origin = fingerprint_tensor(weight)
        key = Key.of(origin.sha256, origin.shape, origin.dtype, "linear", PiSSA(), 0)
        factors = PiSSA().start(weight, 2, Context("m", 1.0, torch.Generator()))
        assert AnchorCache(folder).store(key, Entry(factors, 1.0, origin))
        paths.append(folder / key.name[:2] / key.name / "r2-s1.0.safetensors")
        os.utime(paths[-1], (when, when))
    return paths


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Every file's bytes, every link's target and every folder below a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def foreign(folder: Path, path: Path) -> None:
    """Files in, beside and around an entry that look like entries, but are none of ours."""
    name = "r2-s1.0.safetensors"
    beside = path.with_name
    beside("notes.txt").write_text("mine")
    beside("r02-s1.0.safetensors").write_text("mine")
    beside("r3-s1.0.safetensors.bak").write_text("mine")
    beside(".notes.txt.abcdefgh").write_text("mine")
    beside("r4-s1.0.safetensors").mkdir()
    beside("r5-s1.0.safetensors").symlink_to(folder.parent / "outside" / name)
    beside(f".{name}.abcdefg1").mkdir()
    beside(f".{name}.abcdefg2").symlink_to(folder.parent / "outside" / name)
    (folder / "mine").mkdir()  # and empty
    (path.parents[1] / "mine").mkdir()
    for place in (
        folder,
        folder / "ab",
        folder / "ab" / ("cd" * 32),  # in the folder of other first digits
        folder / "ab" / ("ab" * 31),
        folder / "AB" / ("AB" * 32),
        folder / "model" / ("mo" * 32),
        folder.parent / "outside",
        folder.parent / "outside" / ("ee" * 32),
    ):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    (folder / "ee").symlink_to(folder.parent / "outside")
    (folder / "ab" / ("ab" * 32)).symlink_to(folder.parent / "outside")
    for place in folder.parent.rglob("*"):
        os.utime(place, (1, 1), follow_symlinks=False)


def test_a_missing_or_empty_cache_is_normal(folder):
    for _ in range(2):
        assert cache.info(folder) == cache.Info(0, 0, None, None)
        assert cache.verify(folder, remove=True) == cache.Verified(0, ())
        assert cache.prune(folder, 0) == cache.Pruned(0, 0, 0, 0, ())
        assert not folder.exists() or list(folder.iterdir()) == []
        folder.mkdir(exist_ok=True)


def test_a_folder_that_cannot_be_read_is_an_error(folder):
    folder.write_text("a file")
    for look in (cache.info, cache.verify, lambda place: cache.prune(place, 0)):
        with pytest.raises(
            ConfigError, match=r"anchors: the cache cannot be read: Not a directory"
        ):
            look(folder)
    assert folder.read_text() == "a file"


def test_info_counts_entries_bytes_and_times(folder):
    paths = fill(folder, NOW + 5, NOW, NOW + 9)
    foreign(folder, paths[0])
    for path, when in zip(paths, (NOW + 5, NOW, NOW + 9), strict=True):
        os.utime(path, (when, when))
    size = sum(path.stat().st_size for path in paths)
    assert cache.info(folder) == cache.Info(3, size, NOW, NOW + 9)


def test_verify_finds_the_damaged_and_leaves_them(folder):
    paths = fill(folder, NOW, NOW, NOW)
    raw = bytearray(paths[1].read_bytes())
    raw[-1] ^= 1
    paths[1].write_bytes(raw)
    os.utime(paths[1], (NOW, NOW))
    before, calls = everything(folder), []
    found = cache.verify(folder, progress=lambda *call: calls.append(call))
    assert found.checked == 3
    assert [(bad.path, bad.removed) for bad in found.bad] == [(paths[1], False)]
    assert "not the bytes that were written" in found.bad[0].reason
    assert str(paths[1]) in found.bad[0].reason
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert everything(folder) == before
    assert [path.stat().st_mtime for path in paths] == [NOW] * 3  # checking is no use


def test_verify_removes_the_damaged_where_asked(folder):
    paths = fill(folder, NOW, NOW)
    paths[0].write_bytes(b"")
    paths[0].with_name("notes.txt").write_text("mine")
    paths[0].with_name("r3-s1.0.safetensors").mkdir()
    target = folder.parent / "target"
    target.write_text("mine")
    paths[0].with_name("r4-s1.0.safetensors").symlink_to(target)
    before = everything(folder)
    found = cache.verify(folder, remove=True)
    assert {bad.path.name: bad.removed for bad in found.bad} == {
        "r2-s1.0.safetensors": True,
        "r3-s1.0.safetensors": False,
        "r4-s1.0.safetensors": False,
    }
    del before[str(paths[0].relative_to(folder))]
    assert everything(folder) == before
    assert target.read_text() == "mine"


def test_an_entry_that_is_pruned_while_it_is_checked_is_not_bad(folder, monkeypatch):
    fill(folder, NOW, NOW)
    original, seen = upkeep.read, []

    def read(path: Path) -> Entry:
        seen.append(path)
        if len(seen) == 1:
            path.unlink()
        return original(path)

    monkeypatch.setattr(upkeep, "read", read)
    assert cache.verify(folder) == cache.Verified(1, ())


def test_prune_removes_the_least_recently_used_first(folder):
    paths = fill(folder, NOW + 3, NOW + 1, NOW + 4, NOW + 2)
    sizes = [path.stat().st_size for path in paths]
    kept, calls = sizes[0] + sizes[2], []
    # One byte too small for three: two must go, the ones used last at NOW + 1 and NOW + 2.
    limit = kept + sizes[3] - 1
    done = cache.prune(folder, limit, progress=lambda *call: calls.append(call))
    assert done == cache.Pruned(2, sizes[1] + sizes[3], 2, kept, ())
    assert [path.exists() for path in paths] == [True, False, True, False]
    assert calls == [(1, 2), (2, 2)]
    assert cache.prune(folder, kept) == cache.Pruned(0, 0, 2, kept, ())


def test_a_hit_saves_an_entry_from_pruning(folder):
    paths = fill(folder, NOW, NOW + 1)
    key = Key.parse(_key_text(paths[0]), "key")
    assert AnchorCache(folder).find(key, 1, 1.0, PiSSA()) is not None
    cache.prune(folder, paths[0].stat().st_size)
    assert [path.exists() for path in paths] == [True, False]


def _key_text(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["entry"])["key"]


def test_prune_to_nothing_leaves_no_file_and_no_folder(folder):
    fill(folder, NOW, NOW, NOW)
    (folder / "ab" / ("ab" * 32)).mkdir(parents=True)
    (folder / "cd").mkdir()
    assert cache.prune(folder, 0).entries == 0
    assert list(folder.iterdir()) == []
    assert folder.exists()


def test_prune_removes_what_broken_writes_left_once_it_is_old(folder):
    (path,) = fill(folder, NOW)
    old, new = path.with_name(f".{path.name}.abc_1234"), path.with_name(f".{path.name}.abcd1234")
    for temporary in (old, new):
        temporary.write_bytes(b"12345")
    when = time.time() - 2 * 3600
    os.utime(old, (when, when))
    size = path.stat().st_size
    assert cache.info(folder).bytes == size  # they are no entries
    assert cache.prune(folder, size) == cache.Pruned(0, 5, 1, size, ())
    assert [p.exists() for p in (path, old, new)] == [True, False, True]


def test_prune_touches_nothing_that_is_not_ours(folder):
    (path,) = fill(folder, NOW)
    foreign(folder, path)
    before = everything(folder.parent)
    done = cache.prune(folder, 0)
    assert (done.removed, done.failed) == (1, ())
    del before[str(path.relative_to(folder.parent))]
    assert everything(folder.parent) == before


def test_verify_touches_nothing_that_is_not_ours(folder):
    (path,) = fill(folder, NOW)
    foreign(folder, path)
    before = everything(folder.parent)
    found = cache.verify(folder, remove=True)
    assert found.checked == 3
    assert not any(bad.removed for bad in found.bad)
    assert everything(folder.parent) == before


def test_what_cannot_be_removed_is_told_and_the_rest_is(folder, monkeypatch):
    paths = fill(folder, NOW, NOW + 1)
    original, size = Path.unlink, paths[0].stat().st_size

    def unlink(path: Path, **options: bool) -> None:
        if path == paths[0]:
            raise PermissionError(13, "Permission denied")
        original(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    done = cache.prune(folder, 0)
    assert (done.removed, done.entries, done.bytes) == (1, 1, size)
    (reason,) = done.failed
    assert str(paths[0]) in reason
    assert "Permission denied" in reason
    paths[0].write_bytes(b"damaged")
    (bad,) = cache.verify(folder, remove=True).bad
    assert bad.removed is False
