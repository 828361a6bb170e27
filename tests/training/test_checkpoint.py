"""A checkpoint brings back factors, moments and random state, or changes nothing."""

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tether.errors import (
    DigestError,
    FormatError,
    HeaderError,
    OffloadedError,
    PickleRefusedError,
    TruncatedFileError,
    WriteError,
)
from tether.training import checkpoint

from .conftest import Live, examples


@pytest.fixture
def saved(live: Callable[..., Live], tmp_path: Path) -> tuple[Path, Live]:
    """A checkpoint of two steps, and the run it was made of."""
    run = live()
    run.train(examples(8), until=2)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, run.handle, run.optimizer, 2)
    return path, run


def same(one: Live, other: Live) -> bool:
    return all(map(torch.equal, one.state(), other.state()))


def test_it_brings_back_every_bit_and_the_next_step_is_the_same(saved, live):
    path, run = saved
    wanted = run.state()
    other = live()
    torch.manual_seed(9)
    assert checkpoint.load(path, other.handle, other.optimizer) == 2
    assert all(map(torch.equal, wanted, other.state()))
    assert run.train(examples(8), first=2, until=4) == other.train(examples(8), first=2, until=4)
    assert same(run, other)


def test_before_the_first_step_there_are_no_moments(live, tmp_path):
    run, other = live({"init": "lora", "seed": 1}), live({"init": "lora", "seed": 2})
    checkpoint.save(tmp_path / "c", run.handle, run.optimizer, 0)
    assert checkpoint.load(tmp_path / "c", other.handle, other.optimizer) == 0
    assert not other.optimizer.state
    assert run.train(examples(8), until=2) == other.train(examples(8), until=2)
    assert same(run, other)


def test_an_offloaded_adapter_is_not_saved_empty(saved):
    path, run = saved
    before = path.read_bytes()
    run.handle.offload("cpu")
    with pytest.raises(OffloadedError, match=r"Call handle\.restore\(\) first"):
        checkpoint.save(path, run.handle, run.optimizer, 2)
    assert path.read_bytes() == before


def test_saving_changes_nothing(saved):
    path, run = saved
    before, versions = run.state(), [p._version for p in run.model.parameters()]
    checkpoint.save(path, run.handle, run.optimizer, 2)
    assert all(map(torch.equal, before, run.state()))
    assert versions == [p._version for p in run.model.parameters()]


def test_a_full_disk_leaves_the_older_checkpoint(saved, monkeypatch):
    path, run = saved
    before = path.read_bytes()
    run.train(examples(8), first=2, until=3)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"checkpoint.safetensors: .*No space left"):
        checkpoint.save(path, run.handle, run.optimizer, 3)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 4
    return bytes(changed)


def step_replaced(data: bytes) -> bytes:
    return data.replace(b'"step":"2"', b'"step":"7"')


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data[:-1], TruncatedFileError),
        (lambda data: data[:100], TruncatedFileError),
        (lambda data: b"", TruncatedFileError),
        (lambda data: flipped(data, -1), DigestError),
        (lambda data: flipped(data, len(data) // 2), DigestError),
        (step_replaced, DigestError),
        (lambda data: flipped(data, 9), HeaderError),
        (lambda data: data.replace(b"tether-checkpoint", b"tether-checkpoinT"), HeaderError),
        (lambda data: pickle.dumps({"a": 1}), PickleRefusedError),
        (None, FormatError),  # missing
    ],
)
def test_a_damaged_file_is_named_and_changes_nothing(damage, error, saved, live):
    path, _ = saved
    if damage is None:
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(damage(data))
        assert path.read_bytes() != data
    other = live()
    other.train(examples(8), until=1)
    before = other.state()
    with pytest.raises(error, match=str(path)):
        checkpoint.load(path, other.handle, other.optimizer)
    assert all(map(torch.equal, before, other.state()))


@pytest.mark.parametrize(
    "lora",
    [{"rank": 3}, {"target_modules": ["q_proj"]}, {"init": "lora"}],
    ids=["another rank", "fewer sites", "no anchor"],
)
def test_another_adapters_checkpoint_is_refused_and_changes_nothing(lora, saved, live):
    path, _ = saved
    other = live(lora)
    before = other.state()
    with pytest.raises(HeaderError, match=rf"{path}: tensor '\w+\.model\.layers\."):
        checkpoint.load(path, other.handle, other.optimizer)
    assert all(map(torch.equal, before, other.state()))
