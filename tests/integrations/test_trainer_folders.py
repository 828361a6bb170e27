"""Folders of a run: published whole, removed whole, and nothing that is not ours is touched."""

import os
from pathlib import Path

import pytest

from tether import fs
from tether.errors import DistributedError, HeaderError, WriteError
from tether.integrations.transformers import folders


def filled(path, text):
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text, "utf-8")
    return path


def test_a_folder_is_published_in_one_step_also_over_an_older_one(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(fs, "_sync", lambda path: flushed.append(Path(path).name))
    for text in ("one", "two"):
        fs.publish_directory(filled(tmp_path / "aside" / text, text), tmp_path / "run")
        assert (tmp_path / "run" / "inner" / "file").read_text("utf-8") == text
        assert not list((tmp_path / "aside").iterdir())
    # Everything in it before its name, and its name last.
    assert flushed[:4] == ["inner", "file", "one", tmp_path.name]


def test_what_cannot_be_published_says_so_and_leaves_the_older_one(tmp_path, monkeypatch):
    filled(tmp_path / "run", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        fs.publish_directory(filled(tmp_path / "aside", "new"), tmp_path / "run")
    assert (tmp_path / "run" / "inner" / "file").read_text("utf-8") == "old"


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    filled(tmp_path / "run", "old")
    filled(tmp_path / "aside" / "run", "left by a kill")
    removed = []
    remove = fs.shutil.rmtree

    def rmtree(path, **options):
        removed.append((Path(path), (tmp_path / "run").exists()))
        remove(path, **options)

    monkeypatch.setattr(fs.shutil, "rmtree", rmtree)
    fs.discard_directory(tmp_path / "run", tmp_path / "aside" / "run")
    assert removed[-1] == (tmp_path / "aside" / "run", False)
    assert not list((tmp_path / "aside").iterdir())
    fs.discard_directory(tmp_path / "run", tmp_path / "aside" / "run")  # gone already


def test_only_checkpoints_are_rotated(tmp_path):
    names = ["checkpoint-2", "checkpoint-10", "checkpoint-4", "checkpoint-4-mine", "checkpoint-x"]
    for name in names:
        filled(tmp_path / name, name)
    (tmp_path / "checkpoint-1").write_text("a file", "utf-8")
    folders.rotate(tmp_path, None, None)
    folders.rotate(tmp_path, 3, None)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoint-1"}
    folders.rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names, "checkpoint-1"} - {"checkpoint-4"}


def test_the_best_is_known_by_another_path_to_it(tmp_path, monkeypatch):
    for number in (2, 4, 6):
        filled(tmp_path / "run" / f"checkpoint-{number}", "")
    monkeypatch.chdir(tmp_path)
    folders.rotate(tmp_path / "run", 1, "run/checkpoint-2")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint-2", "checkpoint-6"}


def test_what_a_kill_left_is_cleared(tmp_path):
    filled(tmp_path / folders.UNFINISHED / "checkpoint-4", "half")
    folders.clear(tmp_path)
    folders.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_says_how_many_processes_it_is_of(tmp_path):
    folders.check_ranks(tmp_path, 2)  # an older one says nothing
    folders.write_ranks(tmp_path, 2)
    folders.check_ranks(tmp_path, 2)
    with pytest.raises(DistributedError, match=r"of 2 processes, and here is 1: .* Start 2 \("):
        folders.check_ranks(tmp_path, 1)
    folders.write_ranks(tmp_path, 1)
    with pytest.raises(
        DistributedError, match=r"of 1 process, and here are 4: .* Start 1 \("
    ) as error:
        folders.check_ranks(tmp_path, 4)
    assert f"tether.load('{tmp_path / 'adapter.safetensors'}')" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "[2]", "{}", "\xff", " " * 1001, '{"world_size": 2, "world_size": 2}'),
        *(f'{{"world_size": {size}}}' for size in ('"2"', "true", "0", "-1", "2.0", "null")),
    ],
)
def test_a_malformed_note_of_the_processes_is_refused(text, tmp_path):
    (tmp_path / "ranks.json").write_text(text, "utf-8")
    with pytest.raises(HeaderError, match=r"ranks\.json"):
        folders.check_ranks(tmp_path, 2)
