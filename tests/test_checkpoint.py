"""A model folder read tensor by tensor, and index files that lie."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tether.checkpoint import Checkpoint
from tether.errors import (
    HeaderError,
    ModelError,
    PickleRefusedError,
    TruncatedFileError,
    UnknownNameError,
)

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = {
    FILES[0]: {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4).bfloat16()},
    FILES[1]: {"c.weight": torch.tensor([3, 4], dtype=torch.int64), "d.bias": torch.tensor(1.5)},
}
LISTED = {name: file for file, tensors in TENSORS.items() for name in tensors}


def sharded(folder, listed=None, **more):
    """Two shards and their index."""
    folder.mkdir()
    for file, tensors in TENSORS.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": LISTED if listed is None else listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | more))
    return folder


def one_file(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(*wanted):
    return {name: torch.zeros(1) for name in wanted}


@pytest.mark.parametrize("size", ["50GB", "4KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_transformers_own_files_bit_for_bit(tiny_llama, tmp_path, size, dtype):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    base = Checkpoint.open(tmp_path)
    files = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == (size == "4KB")
    assert {file: set(names) for file, names in base.shards.items()} == {
        file: set(tensors) for file, tensors in files.items()
    }
    assert base.config == json.loads((tmp_path / "config.json").read_text())
    state = model.state_dict()
    assert set(base.names) == set(state) - {"lm_head.weight"}
    for name in base.names:
        tensor = base.tensor(name)
        assert torch.equal(tensor, state[name])
        assert (tensor.dtype, tuple(tensor.shape)) == (base.dtype(name), base.shape(name))
        assert base.dtype(name) == dtype
        assert name in base


def test_a_tensor_is_the_callers_own_and_no_file_stays_mapped(tmp_path):
    base = Checkpoint.open(sharded(tmp_path / "m"))
    tensor = base.tensor("a.weight")
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    tensor.zero_()
    assert torch.equal(base.tensor("a.weight"), TENSORS[FILES[0]]["a.weight"])
    scalar = base.tensor("d.bias")
    assert (scalar.shape, float(scalar)) == ((), 1.5)
    assert base.tensor("c.weight").tolist() == [3, 4]


def test_tensors_are_in_the_files_own_order(tmp_path):
    folder = one_file(
        tmp_path, {"z": torch.zeros(2).double(), "y": torch.zeros(2), "a": torch.ones(3)}
    )
    assert Checkpoint.open(folder).shards == {"model.safetensors": ("z", "a", "y")}


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder = sharded(tmp_path / "m")
    save_file(names("whole"), folder / "model.safetensors")
    assert Checkpoint.open(folder).names == ("whole",)


TIED = {"tie_word_embeddings": True}
GPT2 = ("h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias", "wte.weight")
LLAMA = ("model.layers.0.up.weight", "model.layers.10.up.weight", "model.embed.weight")


@pytest.mark.parametrize(
    ("stored", "path", "parameter", "found"),
    [
        (LLAMA, "model.layers.0.up", "weight", LLAMA[0]),
        (LLAMA, "layers.0.up", "weight", LLAMA[0]),
        (LLAMA, "layers.10.up", "weight", LLAMA[1]),
        (GPT2, "transformer.h.0.attn.c_attn", "weight", GPT2[0]),
        (GPT2, "transformer.h.0.attn.c_attn", "bias", GPT2[1]),
        (GPT2, "h.0.attn.c_attn", "weight", GPT2[0]),
        (("up.weight", "model.up.weight"), "up", "weight", "up.weight"),
    ],
)
def test_a_prefix_more_or_less_is_found(tmp_path, stored, path, parameter, found):
    base = Checkpoint.open(one_file(tmp_path, names(*stored)))
    assert base.weight_name(path, parameter) == found


@pytest.mark.parametrize(
    ("stored", "path", "config", "words"),
    [
        (LLAMA, "model.layers.0.upp", {}, "has no tensor 'model.layers.0.upp.weight'. Nearest: "),
        (LLAMA, "ayers.0.up", {}, "has no tensor 'ayers.0.up.weight'"),
        (("a.up.weight", "b.up.weight"), "up", {}, "may be 'a.up.weight' or 'b.up.weight'"),
        # The checkpoint has an encoder: its prefix is not what is lacking.
        (("encoder.norm.weight", "up.weight"), "encoder.up", {}, "has no tensor 'encoder.up"),
        (LLAMA, "lm_head", TIED, "the output head is tied to the embedding. Untie it"),
        (LLAMA, "lm_head", {}, "the output head is tied to the embedding. Untie it"),
        (LLAMA, "lm_head", {"tie_word_embeddings": False}, "has no tensor 'lm_head.weight'"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, stored, path, config, words):
    base = Checkpoint.open(one_file(tmp_path, names(*stored), config))
    with pytest.raises(UnknownNameError, match=re.escape(words)):
        base.weight_name(path)


@pytest.mark.parametrize("read", ["tensor", "shape", "dtype"])
def test_a_wrong_name_is_answered_with_the_nearest(tmp_path, read):
    base = Checkpoint.open(sharded(tmp_path / "m"))
    with pytest.raises(UnknownNameError, match=r"no tensor 'a.wait'. Nearest: 'a.weight'"):
        getattr(base, read)("a.wait")


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (LISTED | {"a.weight": "../outside.safetensors"}, "not the plain name"),
        (LISTED | {"a.weight": "/etc/passwd"}, "not the plain name"),
        (LISTED | {"a.weight": "sub\\file.safetensors"}, "not the plain name"),
        (LISTED | {"a.weight": "\0.safetensors"}, "not the plain name"),
        (LISTED | {"a.weight": "x" * 300 + ".safetensors"}, "not the plain name"),
        (LISTED | {"a.weight": "config.json"}, "not the plain name"),
        (LISTED | {"a.weight": 3}, "names the file 3"),
        (LISTED | {"a.weight": None}, "names the file None"),
        (LISTED | {"a.weight": "missing.safetensors"}, "there is no such file"),
        (LISTED | {"a.weight": FILES[1]}, f"'a.weight', for which .* names '{FILES[1]}'"),
        (LISTED | {"e.weight": FILES[0]}, "for 'e.weight', which is not in it"),
        ({"a.weight": FILES[0]}, "holds 'b.weight', for which .* names None"),
        ({}, "no table 'weight_map'"),
        ([], "no table 'weight_map'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, listed, words):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = sharded(tmp_path / "m", listed)
    with pytest.raises(HeaderError, match=words):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"a": "b.safetensors"}, "weight_map": {}}', "a key is repeated"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "no table 'weight_map'"),
        ('{"weight_map": NaN}', "not valid JSON"),
        (b"\xff\xfe", "not valid UTF-8"),
        (" " * (64 * 2**20 + 1), "exceed the limit"),
    ],
    ids=["repeated", "deep", "list", "nan", "bytes", "large"],
)
def test_an_index_that_is_malformed_is_refused(tmp_path, text, words):
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    with pytest.raises(HeaderError, match=words):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "is not a table")],
    ids=["cut", "deep", "list"],
)
def test_a_config_that_is_malformed_is_refused(tmp_path, text, words):
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(HeaderError, match=words):
        Checkpoint.open(folder)


def test_a_config_of_any_size_is_not_read(tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_text("{}" + " " * 16 * 2**20)
    with pytest.raises(HeaderError, match="16777218 bytes exceed the limit of 16777216"):
        Checkpoint.open(folder)


def test_a_config_may_hold_infinite_settings(tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(folder).config["time_step_limit"] == [0.0, float("inf")]
    (folder / "config.json").unlink()
    assert Checkpoint.open(folder).config == {}


@pytest.mark.parametrize("name", [FILES[0], "model.safetensors.index.json", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_text("{}")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeaderError, match="is a link out of the folder"):
        Checkpoint.open(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """models--x/snapshots/<revision>/<file> -> ../../blobs/<digest>, itself reached by a link."""
    source, snapshot = sharded(tmp_path / "m"), tmp_path / "models--x/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x/blobs").mkdir()
    for number, file in enumerate(source.iterdir()):
        shutil.move(file, tmp_path / f"models--x/blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert Checkpoint.open(folder).tensor("c.weight").tolist() == [3, 4]
    blob = (snapshot / FILES[0]).resolve()
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeaderError, match="is a link out of the folder"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PickleRefusedError) as caught:
        Checkpoint.open(tmp_path)
    assert name in str(caught.value)
    assert f"M.from_pretrained('{tmp_path}').save_pretrained('NEW')" in str(caught.value)


def test_a_pickle_in_the_place_of_a_shard_is_refused(tmp_path):
    folder = sharded(tmp_path / "m")
    torch.save(TENSORS[FILES[0]], folder / FILES[0])
    with pytest.raises(PickleRefusedError, match=FILES[0]):
        Checkpoint.open(folder)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is not a folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)


def test_files_cut_off_before_and_after_opening(tmp_path):
    folder = sharded(tmp_path / "m")
    base, whole = Checkpoint.open(folder), (folder / FILES[0]).read_bytes()
    (folder / FILES[0]).write_bytes(whole[:-1])
    with pytest.raises(TruncatedFileError, match="has 7 of 8 bytes"):
        base.tensor("b.weight")
    with pytest.raises(TruncatedFileError, match="cut off or damaged"):
        Checkpoint.open(folder)
    (folder / FILES[0]).unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        base.tensor("a.weight")


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    raw = len(header).to_bytes(8, "little") + header + b"\0\0"
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(HeaderError, match="'a' has dtype F4; read are F64, F32"):
        Checkpoint.open(tmp_path)
