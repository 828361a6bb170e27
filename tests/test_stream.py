"""A safetensors file written tensor by tensor: the same file to every reader, or none at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tether.errors import (
    ConfigError,
    ShapeMismatchError,
    TetherError,
    UnknownNameError,
    WriteError,
)
from tether.formats import container
from tether.stream import TensorWriter

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "ünïcode": torch.arange(7, dtype=torch.int32),
    "wide": torch.linspace(-1, 1, 12).reshape(3, 4),
    "none": torch.empty(0, 3),
    "eight": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
}


def specs(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, tensors=TENSORS, order=None, metadata=None, room=0):
    with TensorWriter(path, specs(tensors), room) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
        writer.finish(metadata)
    return path


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert bits(tensor) == bits(right[name])


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS)), sorted(TENSORS)])
def test_every_reader_gets_the_same_bits_whatever_the_order(order, tmp_path):
    metadata = {"format": "pt", "é": '"'}
    path = write(tmp_path / "a", order=order, metadata=metadata, room=40)
    same(load_file(path), TENSORS)
    tensors, found = container.read(path)
    same(tensors, TENSORS)
    assert found == metadata
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("wide").get_shape() == [3, 4]
    assert path.read_bytes() == write(tmp_path / "b", metadata=metadata, room=40).read_bytes()


def test_each_tensor_lies_at_a_multiple_of_its_width(tmp_path):
    raw = write(tmp_path / "a", metadata={"a": "b"}, room=33).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0
    assert len(raw) == 8 + length + sum(tensor.nbytes for tensor in TENSORS.values())


def test_strided_tensors_are_written_row_by_row(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    path = write(tmp_path / "a", {"t": matrix.T, "s": matrix[:, ::2]})
    same(load_file(path), {"t": matrix.T.contiguous(), "s": matrix[:, ::2].contiguous()})


def test_metadata_fit_exactly_the_room_kept_for_them(tmp_path):
    metadata = {"key": "x" * 101}
    room = len(json.dumps(metadata, separators=(",", ":")))
    assert container.read(write(tmp_path / "a", metadata=metadata, room=room))[1] == metadata
    with pytest.raises(
        ConfigError, match=r"the metadata need [0-9]+ bytes more than metadata_room"
    ):
        write(tmp_path / "b", metadata=metadata, room=room - 16)


def unfinished(writer):
    writer.write("wide", TENSORS["wide"])


def missing(writer):
    writer.write("wide", TENSORS["wide"])
    writer.finish()


def twice(writer):
    writer.write("wide", TENSORS["wide"])
    writer.write("wide", TENSORS["wide"])


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (unfinished, WriteError, "without finish"),
        (missing, WriteError, r"'flag' was never written \(1 of 2 are missing\)"),
        (twice, UnknownNameError, "'wide' has been written already"),
        (lambda w: w.write("wire", torch.zeros(1)), UnknownNameError, "Nearest: 'wide'"),
        (lambda w: w.write("wide", torch.zeros(4, 3)), ShapeMismatchError, r"\(4, 3\).*\(3, 4\)"),
        (lambda w: w.write("wide", torch.zeros(3, 4).half()), ShapeMismatchError, "float16.*32"),
    ],
)
def test_a_file_that_is_not_whole_cannot_be_read(use, error, words, tmp_path):
    path = tmp_path / "a"
    announced = {name: TENSORS[name] for name in ("flag", "wide")}
    with pytest.raises(error, match=words), TensorWriter(path, specs(announced)) as writer:
        use(writer)
    with pytest.raises(TetherError):
        container.read(path)


def test_the_error_in_the_block_is_the_one_that_is_seen(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        TensorWriter(tmp_path / "a", specs(TENSORS)) as writer,
    ):
        raise KeyboardInterrupt
    assert writer._file.closed


@pytest.mark.parametrize(
    "specs",
    [{"__metadata__": (torch.float32, (1,))}, {"a": (torch.complex64, (1,))}],
)
def test_what_the_format_does_not_have_is_refused(specs, tmp_path):
    with pytest.raises(ConfigError, match="a file cannot hold a tensor"):
        TensorWriter(tmp_path / "a", specs)
    assert not (tmp_path / "a").exists()
