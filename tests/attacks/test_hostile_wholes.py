"""Files with hostile magnitudes, biases and whole modules, native and PEFT."""

import copy
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tether
from attacks.forge import PREFIX, WEIGHTS, parts, peft_folder, peft_tensors, refused, seal
from formats.test_native_wholes import SITE, version_1, with_wholes
from tether.errors import (
    HeaderError,
    NonFiniteError,
    TetherError,
    UnsupportedAdapterError,
)

T = torch.ones


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a valid native file with every part."""
    tether.save(with_wholes(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_what_the_forge_leaves_alone_loads(path):
    adapter = tether.load(seal(path, *parts(path)))
    assert list(adapter.modules) == ["score", "pooler"]


FORMS = [True, False, 0, 1, "", "Anchored", "moved", "anchor", [], ["whole"], {}, {"whole": 1}]
PLACES = {
    "magnitude": ("layers", 0, "magnitude"),
    "bias": ("biases", SITE),
    "module": ("modules", "score", "weight"),
}


def put(header: dict, place: tuple[object, ...], value: object) -> dict:
    header = copy.deepcopy(header)
    at = header
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return header


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_form_that_is_none(path, place, form):
    header, tensors = parts(path)
    refused(seal(path, put(header, place, form), tensors), HeaderError, repr(form))


@pytest.mark.parametrize("place", list(PLACES.values())[1:], ids=list(PLACES)[1:])
def test_a_form_that_is_missing(path, place):
    header, tensors = parts(path)
    refused(seal(path, put(header, place, None), tensors), HeaderError, "None")


@pytest.mark.parametrize("value", [None, True, 3, "x", [], ["norm"], [{"norm": "whole"}]], ids=repr)
@pytest.mark.parametrize("place", [("biases",), ("modules",), ("modules", "score")], ids=str)
def test_a_table_that_is_none(path, place, value):
    header, tensors = parts(path)
    refused(seal(path, put(header, place, value), tensors), HeaderError)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_form_that_is_not_that_of_its_tensors(path, place):
    header, tensors = parts(path)
    refused(seal(path, put(header, place, "whole"), tensors), HeaderError, ":whole", "missing")


def test_a_part_without_a_form_leaves_tensors_over(path):
    header, tensors = parts(path)
    for place, stem in (
        (PLACES["magnitude"], f"{SITE}:magnitude"),
        (("biases",), f"{SITE}:bias"),
        (("modules", "score"), "score:"),
    ):
        value = None if place[0] == "layers" else {}
        refused(seal(path, put(header, place, value), tensors), HeaderError, stem)


NAMES = sorted(
    f"{stem}:{side}"
    for stem, sides in {
        f"{SITE}:magnitude": ("moved", "anchor"),
        "head:magnitude": ("whole",),
        f"{SITE}:bias": ("moved", "anchor"),
        "norm:bias": ("whole",),
        "score:weight:module": ("moved", "anchor"),
        "pooler:dense.weight:module": ("whole",),
    }.items()
    for side in sides
)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing(path, name):
    header, tensors = parts(path)
    del tensors[name]
    refused(seal(path, header, tensors), HeaderError, name, "missing")


@pytest.mark.parametrize(
    "name",
    [
        f"{SITE}:magnitude:whole",
        f"{SITE}:bias:whole",
        "norm:bias:moved",
        "norm:bias:anchor",
        "norm:magnitude:whole",
        "score:weight:module:whole",
        "score:weight:module",
        "score:other:module:whole",
        "other:weight:module:whole",
        "score.weight",
    ],
)
def test_a_tensor_too_many(path, name):
    header, tensors = parts(path)
    refused(seal(path, header, tensors | {name: T(3)}), HeaderError, name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_finite(path, name, value):
    header, tensors = parts(path)
    tensors[name].view(-1)[1] = value
    refused(seal(path, header, tensors), NonFiniteError, name)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_dtype(path, name, dtype):
    header, tensors = parts(path)
    tensors[name] = tensors[name].to(dtype)
    refused(seal(path, header, tensors), HeaderError, name, str(dtype))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{SITE}:magnitude:moved", (4,)),
        (f"{SITE}:magnitude:moved", (1,)),
        (f"{SITE}:magnitude:anchor", (2,)),
        (f"{SITE}:magnitude:anchor", ()),
        ("head:magnitude:whole", (3,)),
        ("head:magnitude:whole", (1, 2)),
        ("head:magnitude:whole", (0,)),
        (f"{SITE}:bias:anchor", (3, 1)),
        ("score:weight:module:moved", (3, 2)),
        ("score:weight:module:anchor", (6,)),
    ],
    ids=str,
)
def test_a_tensor_of_another_shape(path, name, shape):
    header, tensors = parts(path)
    tensors[name] = T(shape)
    refused(seal(path, header, tensors), HeaderError, str(shape))


def test_version_1_holds_no_parts(tmp_path):
    path = version_1(tmp_path / "a.safetensors")
    header, tensors = parts(path)
    for field in ("biases", "modules"):
        refused(seal(path, header | {field: {}}, tensors, version="1"), HeaderError, field)
    odd = put(header, ("layers", 0, "magnitude"), None)
    refused(seal(path, odd, tensors, version="1"), HeaderError, "magnitude")
    odd = tensors | {f"{SITE}:bias:whole": T(3)}
    refused(seal(path, header, odd, version="1"), HeaderError, f"{SITE}:bias")
    refused(seal(path, header, tensors, version="2"), HeaderError, "missing")
    header["layers"] = {}
    refused(seal(path, header, tensors, version="1"), HeaderError, "layers")
    refused(seal(path, [], tensors, version="1"), HeaderError)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a\nb", "a\0b", "x" * 5000, "__class__"]
)
def test_a_module_s_path_is_a_name_and_never_a_place(path, name):
    header, tensors = parts(path)
    for stem in ("norm:bias", "pooler:dense.weight:module", "pooler:scale:module"):
        for key in [k for k in tensors if k.startswith(stem)]:
            new = key.replace(stem.split(":")[0], name).replace("dense.weight", name)
            tensors[new] = tensors.pop(key)
    header["biases"] = {SITE: "anchored", name: "whole"}
    header["modules"] = {
        "score": header["modules"]["score"],
        name: {name: "whole", "scale": "anchored"},
    }
    adapter = tether.load(seal(path, header, tensors))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 3)])})
    with pytest.raises(TetherError):
        tether.attach(model, adapter, verify=False)
    around = set(path.parent.parent.iterdir())
    tether.save(adapter, path.parent / "again.safetensors")
    assert list(tether.load(path.parent / "again.safetensors").biases) == [SITE, name]
    assert set(path.parent.iterdir()) == {path, path.parent / "again.safetensors"}
    assert set(path.parent.parent.iterdir()) == around


# ---- PEFT folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """To be written by the test."""
    return tmp_path / "lora"


M = f"{PREFIX}m"


def peft(folder: Path, config: dict, more: dict[str, Tensor]) -> Path:
    return peft_folder(folder, config, peft_tensors() | more)


def test_what_a_folder_may_hold(folder):
    config = {"use_dora": True, "bias": "all", "modules_to_save": ["score"]}
    more = {
        f"{M}.lora_magnitude_vector": T(4),
        f"{M}.base_layer.bias": T(4),
        f"{PREFIX}norm.bias": T(2),
        f"{PREFIX}score.weight": T(2, 4),
    }
    adapter = tether.load(peft(folder, config, more))
    assert torch.equal(adapter.layers["m"].magnitude.trainable, T(4))
    assert list(adapter.biases) == ["m", "norm"]
    assert {p: list(state) for p, state in adapter.modules.items()} == {"score": ["weight"]}


@pytest.mark.parametrize(
    ("config", "more", "kind", "word"),
    [
        # A name of which there is nothing in the file: it would be lost.
        ({"modules_to_save": ["score"]}, {}, HeaderError, "'score'"),
        (
            {"modules_to_save": ["score", "head"]},
            {f"{PREFIX}score.weight": T(2)},
            HeaderError,
            "'head'",
        ),
        # Tensors that no setting names.
        ({}, {f"{PREFIX}score.weight": T(2)}, UnsupportedAdapterError, "score.weight"),
        ({}, {f"{PREFIX}norm.bias": T(2)}, UnsupportedAdapterError, "norm.bias"),
        (
            {"bias": "lora_only"},
            {f"{PREFIX}norm.bias": T(2)},
            UnsupportedAdapterError,
            "norm.bias",
        ),
        (
            {},
            {f"{M}.lora_magnitude_vector": T(4)},
            UnsupportedAdapterError,
            "lora_magnitude_vector",
        ),
        (
            {"use_dora": False},
            {f"{M}.lora_magnitude_vector": T(4)},
            UnsupportedAdapterError,
            "lora_magnitude_vector",
        ),
        # DoRA in part.
        ({"use_dora": True}, {}, HeaderError, "'m'"),
        (
            {"use_dora": True},
            {f"{M}.lora_magnitude_vector": T(4), f"{PREFIX}x.lora_magnitude_vector": T(4)},
            HeaderError,
            "'x'",
        ),
        ({"use_dora": True}, {f"{M}.lora_magnitude_vector": T(3)}, HeaderError, "(3,)"),
        ({"use_dora": True}, {f"{M}.lora_magnitude_vector": T(4, 4)}, HeaderError, "(16,)"),
        ({"use_dora": True}, {f"{M}.lora_magnitude_vector": T(())}, HeaderError, "(1,)"),
        ({"use_dora": True}, {f"{M}.lora_magnitude_vector": T(0)}, HeaderError, "(0,)"),
        (
            {"use_dora": True},
            {f"{M}.lora_magnitude_vector.weight": T(4)},
            UnsupportedAdapterError,
            "lora_magnitude_vector.weight",
        ),
        ({"bias": "lora_all"}, {}, HeaderError, "'lora_all'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_parts_that_do_not_go_together(folder, config, more, kind, word):
    refused(peft(folder, config, more), kind, word, named=folder / WEIGHTS)


VALUES = {
    "magnitude": ({"use_dora": True}, f"{M}.lora_magnitude_vector", (4,)),
    "bias of a site": ({"bias": "lora_only"}, f"{M}.base_layer.bias", (4,)),
    "bias": ({"bias": "all"}, f"{PREFIX}norm.bias", (2,)),
    "module": ({"modules_to_save": ["score"]}, f"{PREFIX}score.weight", (2, 2)),
}


@pytest.mark.parametrize(("config", "key", "shape"), VALUES.values(), ids=VALUES)
def test_values_that_are_not_finite_or_not_floating(folder, tmp_path, config, key, shape):
    for number, value in enumerate((torch.nan, torch.inf, 1e300)):
        tensor = torch.full(shape, value, dtype=torch.float64)
        path = peft(tmp_path / str(number), config, {key: tensor})
        refused(path, NonFiniteError, key.removeprefix(PREFIX))
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        path = peft(tmp_path / str(dtype), config, {key: torch.ones(shape).to(dtype)})
        refused(path, HeaderError, key.removeprefix(PREFIX), str(dtype))


@pytest.mark.parametrize("name", ["m", "M", "lora_A", "weight", "base_model", "model"])
def test_a_name_that_swallows_the_factors_loses_nothing_in_silence(folder, name):
    """Its tensors are factors, or parameters that no model has: refused here or when attached."""
    peft(folder, {"modules_to_save": [name]}, {})
    with pytest.raises(TetherError):
        tether.load(folder)


def test_factors_inside_a_whole_module_are_not_read_as_its_parameters(folder):
    more = {f"{PREFIX}score.lora_A.weight": T(2, 3), f"{PREFIX}score.lora_B.weight": T(4, 2)}
    peft(folder, {"modules_to_save": ["score"]}, more)
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(3, 4), "score": torch.nn.Linear(3, 4)})
    with pytest.raises(TetherError, match=r"lora_[AB]"):
        tether.attach(model, tether.load(folder))


SLOW = {
    "a deep path": ({}, "." * 20_000),
    "a deep path and a name": ({"modules_to_save": ["score"]}, "." * 20_000),
    "many names": ({"modules_to_save": [f"x{i}" for i in range(10_000)]}, "a." * 500 + "m"),
}


@pytest.mark.parametrize(("config", "site"), SLOW.values(), ids=SLOW)
def test_names_that_take_long_are_answered_fast_or_refused(folder, config, site):
    """In time of this process: other work on the machine does not count."""
    more = {f"{PREFIX}{name}.weight": T(1) for name in config.get("modules_to_save", [])[:1]}
    peft_folder(folder, config, peft_tensors(site) | more)
    started = time.process_time()
    with suppress(TetherError):
        tether.load(folder)
    assert time.process_time() - started < 1
