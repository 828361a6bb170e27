"""PEFT folders that are damaged, hostile, or hold what a plain LoRA cannot."""

import ast
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS, Raw, peft_folder, peft_tensors, refused
from tether.errors import (
    HeaderError,
    NonFiniteError,
    NotAnAdapterError,
    PickleRefusedError,
    TetherError,
    UnsupportedAdapterError,
)

A, B = f"{PREFIX}m.lora_A.weight", f"{PREFIX}m.lora_B.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """To be written by the test."""
    return tmp_path / "lora"


def test_what_the_forge_writes_loads(folder):
    layer = tether.load(peft_folder(folder)).layers["m"]
    assert (layer.scaling, layer.rank, layer.trainable.shape) == (2.0, 2, (4, 3))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", HeaderError),
        ("{", HeaderError),
        ('{"peft_type": "LORA", "x": NaN}', HeaderError),
        ('{"peft_type": "LORA", "x": Infinity}', HeaderError),
        ('{"peft_type": "LORA", "peft_type": "LORA"}', HeaderError),
        ("[" * 50_000, HeaderError),
        ('{"a":' * 50_000, HeaderError),
        ('{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}", HeaderError),
        (" " * (4 * 2**20) + "{}", HeaderError),
        ("null", NotAnAdapterError),
        ("[]", NotAnAdapterError),
        ('"LORA"', NotAnAdapterError),
        ("{}", NotAnAdapterError),
        ('{"peft_type": "IA3"}', NotAnAdapterError),
        ('{"peft_type": ["LORA"]}', NotAnAdapterError),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else value.__name__,
)
def test_a_config_that_is_malformed_or_another_s(folder, text, kind):
    refused(peft_folder(folder, Raw(text)), kind, named=folder / CONFIG)


def test_a_config_that_is_not_utf_8(folder):
    (peft_folder(folder) / CONFIG).write_bytes(b'{"peft_type": "\xff"}')
    refused(folder, HeaderError, "UTF-8", named=folder / CONFIG)


NO_NUMBERS = [
    "16",
    True,
    None,
    [],
    {},
    Raw("NaN"),
    Raw("1e400"),
    Raw("-1e400"),
    Raw("1" + "0" * 400),
]
NOT_POSITIVE = [0, -1, 0.0, -0.5]


@pytest.mark.parametrize("alpha", NO_NUMBERS + NOT_POSITIVE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_positive_number(folder, field, alpha):
    config = {field: {"m": alpha} if field == "alpha_pattern" else alpha}
    if config == {"alpha_pattern": {"m": None}}:
        config = {"alpha_pattern": {"m": [None]}}
    word = "" if isinstance(alpha, Raw) else "alpha"
    refused(peft_folder(folder, config), HeaderError, word)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lora_dropout", value) for value in [*NO_NUMBERS, -0.1, 1, 5.0]),
        *(("alpha_pattern", value) for value in ["m", 3, True, [["m", 3]]]),
        *(("use_rslora", value) for value in [1, "true", "false", [], {}]),
        *(("fan_in_fan_out", value) for value in [1, "true", "false", [0]]),
        *(("use_dora", value) for value in [1, 0, "true", [], {}]),
        *(("bias", value) for value in [None, True, 1, "", "ALL", "lora", ["all"], {}]),
        *(("modules_to_save", value) for value in ["m", 1, True, {"m": 1}, [1], [None], [["m"]]]),
        *(("modules_to_save", [value]) for value in ["", "a b", "a/b", ".*", "(a+)+$", "x" * 600]),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_field_of_another_type_or_out_of_range(folder, field, value):
    word = "" if isinstance(value, Raw) else field.removeprefix("lora_")
    refused(peft_folder(folder, {field: value}), HeaderError, word)


STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", None, 7, [], {"a": 1}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", start) for start in STARTS),
        ("lora_bias", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("target_parameters", ["w"]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("arrow_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
        ("kasa_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("a field of tomorrow", 1),
    ],
    ids=str,
)
def test_what_a_plain_lora_cannot_hold_is_refused_by_name(folder, field, value):
    refused(peft_folder(folder, {field: value}), UnsupportedAdapterError, field, repr(value))


BOMBS = [
    "(a+)+$",
    "(a|a)*$",
    "([a-zA-Z]+)*x",
    "a{1,1000}{1,1000}",
    "(?=a)",
    r"(\w)\1",
    "[^.]*x",
    "a" * 600,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_regex_in_a_pattern_is_refused_and_not_run(folder, bomb):
    peft_folder(folder, {"alpha_pattern": {bomb: 8}}, peft_tensors("a" * 2000))
    started = time.process_time()
    refused(folder, UnsupportedAdapterError, "pattern")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("patterns", "site"),
    [
        ({".*.*.*.*.*x": 8}, "a" * 2000),
        ({".*" * 256: 8, "x": 9}, "a" * 2000 + "\n"),
        ({".*a" * 100 + "x": 8}, ".".join("a" * 500)),
        ({"." * 500 + "x": 8}, ".".join("a" * 1000)),
        ({"." * 40 + f"x{i}": 8 for i in range(4000)}, "model.layers.0.self_attn.q_proj"),
        ({"x": 8}, "." * 20_000),
    ],
    ids=["anything", "anything 256 times", "nested", "one by one", "many", "dots"],
)
def test_a_pattern_that_takes_long_is_answered_fast_or_refused(folder, patterns, site):
    peft_folder(folder, {"alpha_pattern": patterns}, peft_tensors(site))
    started = time.process_time()
    with suppress(UnsupportedAdapterError):
        assert list(tether.load(folder).layers) == [site]
    assert time.process_time() - started < 1


def test_too_many_patterns(folder):
    peft_folder(folder, {"alpha_pattern": {f"x{i}": 8 for i in range(5000)}})
    refused(folder, UnsupportedAdapterError, "5000")


T = torch.ones


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({A: T(2, 3)}, "lora_B"),
        ({B: T(4, 2)}, "lora_A"),
        ({A: T(2, 3), B: T(4, 3)}, "(4, 3)"),
        ({A: T(6), B: T(8)}, "(6,)"),
        ({A: torch.tensor(1.0), B: torch.tensor(1.0)}, "()"),
        ({A: T(0, 3), B: T(4, 0)}, "rank"),
        ({A: T(2, 0), B: T(4, 2)}, "(4, 0)"),
        ({A: T(2, 3), B: T(0, 2)}, "(0, 3)"),
        ({A: T(2, 3, 1), B: T(4, 2)}, "(2, 3, 1)"),
        ({A: T(2, 1, 1, 1, 1, 1), B: T(4, 2, 1, 1, 1, 1)}, "(4, 1, 1, 1, 1, 1)"),
        # The kernel is lora_A's: lora_B of a convolution has none.
        ({A: T(4, 3, 2), B: T(5, 2, 2)}, "(5, 2, 2)"),
        # Two answers for one site: which is right cannot be told.
        (peft_tensors() | {f"{PREFIX}m.lora_embedding_A": 2 * T(2, 3)}, "'m'"),
        ({}, "at least one site"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_make_no_lora(folder, tensors, word):
    refused(peft_folder(folder, {}, tensors), HeaderError, word, named=folder / WEIGHTS)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_tensors_of_another_dtype(folder, dtype):
    refused(
        peft_folder(folder, {}, peft_tensors(dtype=dtype)),
        HeaderError,
        A,
        str(dtype),
        named=folder / WEIGHTS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite(folder, dtype, value):
    tensors = peft_tensors(dtype=dtype)
    tensors[B][1, 0] = value
    refused(peft_folder(folder, {}, tensors), NonFiniteError, B, "(1, 0)")


def test_float64_beyond_float32(folder):
    tensors = peft_tensors(dtype=torch.float64)
    tensors[B][1, 0] = 1e300
    refused(peft_folder(folder, {}, tensors), NonFiniteError, B, "(1, 0)")


@pytest.mark.parametrize(
    "base",
    [
        torch.full((4, 3), torch.nan),
        torch.full((4, 3), torch.inf),
        torch.full((4, 3), 1e300, dtype=torch.float64),
        torch.ones(4, 3).to(torch.float8_e4m3fn),
        torch.ones(0, 3),
        torch.tensor(1.0),
    ],
    ids=lambda base: f"{base.dtype} {tuple(base.shape)} {base.float().sum()}",
)
def test_an_odd_copy_of_the_base_s_weight_does_no_harm(folder, tmp_path, base):
    peft_folder(folder, {}, peft_tensors() | {f"{PREFIX}m.base_layer.weight": base})
    try:
        adapter = tether.load(folder)
        tether.save(adapter, tmp_path / "a.safetensors")
    except TetherError:
        return
    assert tether.load(tmp_path / "a.safetensors").provenance == adapter.provenance


@pytest.mark.parametrize(
    "key",
    [
        "m.lora_A.weight",
        f"{PREFIX}m.lora_A.default.weight",
        f"{PREFIX}m.lora_A.bias",
        f"{PREFIX}m.lora_magnitude_vector",
        f"{PREFIX}lm_head.weight",
        "x",
    ],
)
def test_a_tensor_that_would_be_lost(folder, key):
    peft_folder(folder, {}, peft_tensors() | {key: torch.ones(2)})
    refused(folder, UnsupportedAdapterError, repr(key), named=folder / WEIGHTS)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_file_that_is_missing(folder, missing):
    (peft_folder(folder) / missing).unlink()
    refused(folder, NotAnAdapterError, missing)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", ["folder", "broken link", "loop"])
@pytest.mark.timeout(5)
def test_something_else_in_the_place_of_a_file(folder, name, what):
    (peft_folder(folder) / name).unlink()
    if what == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(name if what == "loop" else "nowhere")
    refused(folder, NotAnAdapterError, name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.timeout(5)
def test_a_pipe_is_refused_and_not_waited_for(folder, name):
    (peft_folder(folder) / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, NotAnAdapterError, name)


def test_links_as_the_hub_s_cache_makes_them_are_followed(folder, tmp_path):
    peft_folder(folder).rename(tmp_path / "blobs")
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    assert list(tether.load(folder).layers) == ["m"]


def test_other_files_are_neither_read_nor_touched(folder):
    others = {"evil.py": b"raise SystemExit", "adapter_model.bin": b"\x80\x02.", "a.json": b"{"}
    peft_folder(folder)
    for name, data in others.items():
        (folder / name).write_bytes(data)
    assert list(tether.load(folder).layers) == ["m"]
    assert {name: (folder / name).read_bytes() for name in others} == others
    assert len(list(folder.iterdir())) == len(others) + 2


def test_pickled_weights_alone_are_refused(folder):
    (peft_folder(folder) / WEIGHTS).unlink()
    torch.save(peft_tensors(), folder / "adapter_model.bin")
    named = folder / "adapter_model.bin"
    refused(folder, PickleRefusedError, "save_file", WEIGHTS, named=named)


def test_the_weights_without_their_folder_are_refused(folder):
    peft_folder(folder)
    refused(folder / WEIGHTS, NotAnAdapterError, "whole folder")
    save_file({}, folder / "empty.safetensors")
    refused(folder / "empty.safetensors", NotAnAdapterError)


INJECTIONS = [
    'x"\nlicense: mit\n---\n# Owned',
    "x\r\nlicense: mit",
    "x\u2028license: mit\x85tags: []",
    "'; import os #",
    '"""\nimport os\n"""',
    "\\",
    "!!python/object/apply:os.system [ls]",
    "x: y # z",
    "```\n# Owned",
    "\x7f\x00\x1b[31m",
]


@pytest.mark.parametrize("name", INJECTIONS, ids=ascii)
def test_a_base_s_name_cannot_break_out_of_the_card(folder, tmp_path, name):
    adapter = tether.load(peft_folder(folder, {"base_model_name_or_path": name}))
    assert adapter.provenance.base_model == name
    tether.save_as_lora(adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": name,
        "library_name": "peft",
        "tags": ["lora", "tether"],
    }
    program = text.split("```python\n")[1].split("```\n")[0]
    (line,) = re.findall(r"^model = AutoModelForCausalLM.from_pretrained\((.*)\)$", program, re.M)
    assert ast.literal_eval(line) == name
    assert len(card.splitlines()) == len(clean_card(tmp_path).splitlines())


def clean_card(tmp_path: Path) -> str:
    adapter = tether.load(peft_folder(tmp_path / "a", {"base_model_name_or_path": "org/base"}))
    tether.save_as_lora(adapter, tmp_path / "b")
    return (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
