"""Bytes that are not, or no longer, a file of tether's: cut, flipped, foreign, pickled."""

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch

import tether
from attacks.forge import (
    WEIGHTS,
    Raw,
    is_refused,
    peft_folder,
    refused,
    small_adapter,
    write_container,
)
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance
from tether.errors import (
    HeaderError,
    NotAnAdapterError,
    PickleRefusedError,
    TruncatedFileError,
)
from tether.formats.container import MAX_HEADER


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    tether.save(small_adapter(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_cut_off_anywhere_is_truncated(valid):
    for length in reversed(range(valid.stat().st_size)):
        os.truncate(valid, length)
        refused(valid, TruncatedFileError)


def test_peft_weights_cut_off_anywhere_are_truncated(tmp_path):
    weights = peft_folder(tmp_path / "lora") / WEIGHTS
    for length in reversed(range(weights.stat().st_size)):
        os.truncate(weights, length)
        refused(weights.parent, TruncatedFileError, named=weights)


def test_bytes_added_at_the_end_are_refused(valid):
    valid.write_bytes(valid.read_bytes() + b"\0")
    refused(valid, TruncatedFileError, "longer")


def test_no_single_flipped_bit_is_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    factors = Factors(torch.tensor([[1.0, -0.0]]), torch.tensor([[0.5], [3e-39]]))
    layer = LayerAdapter(factors, None, 1.0, Layout("linear", (2, 2)))
    tether.save(Adapter({"m": layer}, Provenance("lora")), path)
    data, silent = path.read_bytes(), []
    with path.open("r+b", buffering=0) as file:
        for place, bit in itertools.product(range(len(data)), range(8)):
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << bit]), place)
            if not is_refused(path):
                silent.append((place, bit))
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert tether.load(path).layers["m"].trainable.B[1] == 3e-39
    assert not silent


@pytest.mark.parametrize("claimed", [MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1])
def test_an_over_long_header_is_not_read(valid, claimed):
    data = valid.read_bytes()
    valid.write_bytes(claimed.to_bytes(8, "little") + data[8:])
    refused(valid, HeaderError, str(claimed), str(MAX_HEADER))


def test_a_header_longer_than_the_file_is_truncated(valid):
    data = valid.read_bytes()
    claimed = len(data) - 7
    valid.write_bytes(claimed.to_bytes(8, "little") + data[8:])
    refused(valid, TruncatedFileError, str(claimed), str(len(data)))


@pytest.mark.parametrize(
    "header",
    [
        Raw(""),
        Raw("{"),
        Raw("null"),
        Raw("[]"),
        Raw("[" * 100_000),
        Raw('{"__metadata__": {"format": "tether"}, "__metadata__": {}}'),
        Raw("\0"),
        {"__metadata__": {"format": 1}},
        {"__metadata__": ["tether"]},
        {"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": Raw("[NaN]"), "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1]}},
        {
            "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ],
    ids=lambda header: repr(header)[:60],
)
def test_a_malformed_container_header_is_refused(tmp_path, header):
    refused(write_container(tmp_path / "a.safetensors", header, b"\0" * 4), HeaderError)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "U16", "C64", "BOOL"])
def test_tensors_of_any_dtype_of_the_container_are_refused_by_name(tmp_path, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "U16": 16, "C64": 64}.get(dtype, 8)
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
    path = write_container(tmp_path / "a.safetensors", {"x": entry}, b"\0" * bits)
    assert is_refused(path)


class Bomb:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path) -> dict[str, bytes]:
    zipped, legacy = mark.with_suffix(".zip"), mark.with_suffix(".legacy")
    torch.save(Bomb(mark), zipped)
    torch.save(Bomb(mark), legacy, _use_new_zipfile_serialization=False)
    made = {f"protocol {n}": pickle.dumps([Bomb(mark), b"\0" * 100], n) for n in range(2, 6)}
    return made | {"zip": zipped.read_bytes(), "legacy": legacy.read_bytes()}


@pytest.mark.parametrize("name", ["zip", "legacy", *(f"protocol {n}" for n in range(2, 6))])
def test_a_pickle_is_refused_and_never_read(tmp_path, name):
    mark = tmp_path / "mark"
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickles(mark)[name])
    refused(path, PickleRefusedError, "weights_only=True", "save_file")
    weights = peft_folder(tmp_path / "lora") / WEIGHTS
    weights.write_bytes(path.read_bytes())
    refused(weights.parent, PickleRefusedError, named=weights)
    assert not mark.exists()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50, 0x010280])
def test_a_valid_file_whose_header_length_begins_like_a_pickle_loads(tmp_path, length):
    weights = peft_folder(tmp_path / "lora") / WEIGHTS
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].ljust(length)  # spaces at the end, as safetensors itself aligns
    weights.write_bytes(length.to_bytes(8, "little") + header + data[start:])
    assert list(tether.load(weights.parent).layers) == ["m"]


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"PK"])
def test_too_few_bytes(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert is_refused(path)


def test_a_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "none.safetensors", NotAnAdapterError, "no such file")


@pytest.mark.timeout(5)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", NotAnAdapterError)
