"""A safetensors file is read within bounds; JSON is parsed strictly."""

import pytest
import torch
from safetensors.torch import save_file

from tether.errors import HeaderError
from tether.formats import container


def test_tensors_and_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b.é": torch.tensor(3), "c": torch.ones(0, 2)}
    save_file(tensors, tmp_path / "a", {"key": "value", "é": "😀"})
    found, metadata = container.read(tmp_path / "a")
    assert metadata == {"key": "value", "é": "😀"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_no_tensors_and_no_metadata(tmp_path):
    save_file({}, tmp_path / "a")
    assert container.read(tmp_path / "a") == ({}, {})


def test_the_largest_header(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, tmp_path / "a")
    size = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    monkeypatch.setattr(container, "MAX_HEADER", size)
    assert container.read(tmp_path / "a")[0] == {"a": 1}
    monkeypatch.setattr(container, "MAX_HEADER", size - 1)
    with pytest.raises(HeaderError, match=f"claims {size} bytes; at most {size - 1} are read"):
        container.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        (' {"a": [1, -2.5, true, "\\u00e9"]} ', {"a": [1, -2.5, True, "é"]}),
        ('{"a": {"a": 1}}', {"a": {"a": 1}}),
        ("[" * 200 + "]" * 200, None),
        ("1" + "0" * 400, 10**400),
        ("1e300", 1e300),
        ('"NaN"', "NaN"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json(text, value):
    parsed = container.parse_json(text, "here")
    if value is not None:
        assert parsed == value
        assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("NaN", "NaN"),
        ("[Infinity]", "Infinity"),
        ('{"a": -Infinity}', "-Infinity"),
        ("1e400", "1e400"),
        ("[-1e999]", "-1e999"),
        ('{"a": 1, "b": 2, "a": 1}', "repeated"),
        ('{"x": {"a": 1, "a": 1}}', "repeated"),
        ("[" * 100_000, "recursion"),
        ("1" + "0" * 5000, "4300"),
        ("[1] 2", "Extra data"),
        ("01", "Extra data"),
        ("'a'", "Expecting value"),
        ('"\t"', "control character"),
    ],
    ids=lambda value: value[:16],
)
def test_json_that_is_refused(text, word):
    with pytest.raises(HeaderError, match=rf"^here: not valid JSON: .*{word}"):
        container.parse_json(text, "here")


def test_json_at_the_limit():
    assert container.parse_json("[1]", "here", limit=3) == [1]
    with pytest.raises(HeaderError, match="here: 4 characters exceed the limit of 3"):
        container.parse_json("[12]", "here", limit=3)
