"""Native files with right digests and hostile content: an attacker can compute digests too."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tether
from attacks.forge import Raw, is_refused, parts, refused, seal, small_adapter, to_json
from tether.errors import (
    ConfigError,
    DigestError,
    HeaderError,
    NonFiniteError,
    NotAnAdapterError,
)

LAYER = ("layers", 0)  # anchored, rank 2, (3, 4)
PRINT = ("provenance", "fingerprints", "layers.0.up")
SITE = "layers.0.up"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a valid native file."""
    tether.save(small_adapter(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def changed(header: dict, *place: object, to: object, drop: bool = False) -> dict:
    """A copy of a header with one value replaced, or left out."""
    header = copy.deepcopy(header)
    at = header
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = to
    if drop:
        del at[place[-1]]
    return header


def places(value: object, *here: object) -> Iterator[tuple[tuple[object, ...], object]]:
    """Every place in a header, and the value there, but for the free-form `config`."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*here, key), item
        if isinstance(item, dict | list) and key != "config":
            yield from places(item, *here, key)


def test_what_the_forge_leaves_alone_loads(path):
    tensors = tether.load(seal(path, *parts(path))).layers[SITE].trainable
    assert torch.equal(tensors.B, torch.full((3, 2), -0.5))


def test_every_field_is_needed(path):
    header, tensors = parts(path)
    for place, _ in places(header):
        # Elements of a list are not fields; a fingerprint may be absent, and so may certificates,
        # which the first files of this version lack.
        if isinstance(place[-1], str) and place not in (PRINT, ("provenance", "certificates")):
            seal(path, changed(header, *place, to=None, drop=True), tensors)
            refused(path, HeaderError, repr(place[-1]))


HUGE = Raw("1" + "0" * 400)
OPTIONAL = ("seed", "tether_version", "base_model", "base_class", "learning_rate", "steps")


def test_a_field_of_another_type_is_refused(path):
    header, tensors = parts(path)
    silent = []
    for place, value in places(header):
        for other in (None, True, 3, 0.5, "text", [], {}, HUGE, Raw("1e400")):
            fits = (
                type(other) is type(value)
                or (other is None and place[-1] in OPTIONAL)
                or (other == 3 and type(value) is float)
                or (other is HUGE and type(value) is int)
            )
            if fits:
                continue
            seal(path, changed(header, *place, to=other), tensors)
            if not is_refused(path):
                silent.append((*place, other))
    assert not silent


@pytest.mark.parametrize("place", [(), ("provenance",), PRINT, LAYER], ids=str)
def test_a_field_too_many(path, place):
    header, tensors = parts(path)
    header = changed(header, *place, "command", to="rm -rf /")
    refused(seal(path, header, tensors), HeaderError, "command")


@pytest.mark.parametrize("key", ["adapter", "digests", "digest"])
def test_metadata_that_is_missing(path, key):
    refused(seal(path, *parts(path), **{key: None}), HeaderError, repr(key), "missing")


@pytest.mark.parametrize(
    ("metadata", "kind", "word"),
    [
        ({"format": None}, NotAnAdapterError, "not an adapter"),
        ({"format": "TETHER"}, NotAnAdapterError, "not an adapter"),
        ({"format": "pt"}, NotAnAdapterError, "PEFT"),
        ({"version": None}, HeaderError, "None"),
        ({"version": "3"}, HeaderError, "'3'"),
        ({"version": "1.0"}, HeaderError, "'1.0'"),
    ],
    ids=str,
)
def test_an_unknown_format_or_version(path, metadata, kind, word):
    refused(seal(path, *parts(path), **metadata), kind, word)


@pytest.mark.parametrize("key", ["adapter", "digests"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "3",
        "[]",
        '"text"',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 1e400}',
        '{"a": 1, "a": 1}',
        "[" * 50_000,
        '{"a":' * 50_000,
        '{"a": 1' + "0" * 5000 + "}",
        "{'a': 1}",
        "{} {}",
        "\ufeff{}",
    ],
    ids=lambda text: text[:16],
)
def test_json_that_is_malformed(path, key, text):
    header, tensors = parts(path)
    refused(seal(path, header, tensors, **{key: text}), HeaderError)


@pytest.mark.parametrize(
    "text",
    ['{"x": NaN}', '{"x": Infinity}', '{"x": 1e400}', '{"x": -1e400}', '{"x": 1, "x": 1}'],
)
def test_json_that_is_malformed_deep_inside(path, text):
    header, tensors = parts(path)
    refused(seal(path, changed(header, "config", to=Raw(text)), tensors), HeaderError)


@pytest.mark.parametrize("digests", [{}, {"head.A": None}, {"head.A": "0" * 64}])
def test_digests_that_name_other_tensors(path, digests):
    refused(seal(path, *parts(path), digests=to_json(digests)), HeaderError, "digests")


@pytest.mark.parametrize("digest", [None, 3, [], "", "0" * 64])
def test_a_digest_that_is_another(path, digest):
    header, tensors = parts(path)
    digests = dict.fromkeys(tensors, digest)
    refused(seal(path, header, tensors, digests=to_json(digests)), DigestError, "sha256")


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_a_seal_that_is_another(path, digest):
    refused(seal(path, *parts(path), digest=digest), DigestError, "header's sha256")


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("scaling", 0, "positive"),
        ("scaling", -0.5, "-0.5"),
        ("scaling", Raw("1e400"), ""),
        ("dropout", -0.125, "-0.125"),
        ("dropout", 1, "[0, 1)"),
        ("dropout", Raw("1e400"), ""),
        ("kind", "sparse", "sparse"),
        ("kind", "transposed", "(3, 4)"),
        ("kind", "embedding", "(3, 4)"),
        ("kind", "conv", "shape"),
        ("shape", [], "()"),
        ("shape", [12], "(12,)"),
        ("shape", [3, 4, 1], "(3, 4, 1)"),
        ("shape", [-3, -4], "(-3, -4)"),
        ("shape", [0, 4], "(0, 4)"),
        ("shape", [3, 5], "(3, 5)"),
        ("shape", [4, 3], "(4, 3)"),
        ("shape", [10**30, 4], "(3, 4)"),
        ("shape", [True, 4], "bool"),
        ("anchored", False, f"{SITE}.A"),
        ("path", "layers.0.down", "layers.0.down"),
        ("path", "head", "twice"),
    ],
    ids=repr,
)
def test_a_layer_that_cannot_be_meant(path, field, value, word):
    header, tensors = parts(path)
    header = changed(header, *LAYER, field, to=value)
    header["layers"].reverse()  # so that the name of the other layer is the second of two
    refused(seal(path, header, tensors), HeaderError, word)


def test_a_layer_listed_twice(path):
    header, tensors = parts(path)
    header["layers"].append(header["layers"][0])
    refused(seal(path, header, tensors), HeaderError, SITE, "twice")


def test_no_layers(path):
    header, tensors = parts(path)
    refused(seal(path, changed(header, "layers", to=[]), {}), HeaderError, "at least one site")
    refused(seal(path, changed(header, "layers", to=[]), tensors), HeaderError, "no layer")


@pytest.mark.parametrize("name", [f"{SITE}.dA", f"{SITE}.dB", f"{SITE}.A0", f"{SITE}.B0", "head.A"])
def test_a_tensor_that_is_missing(path, name):
    header, tensors = parts(path)
    del tensors[name]
    refused(seal(path, header, tensors), HeaderError, name, "missing")


@pytest.mark.parametrize("name", ["x", f"{SITE}.A", "head.dA", "head.A0", f"{SITE}.dA.dA"])
def test_a_tensor_too_many(path, name):
    header, tensors = parts(path)
    refused(seal(path, header, tensors | {name: torch.ones(1, 4)}), HeaderError, name)


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        (f"{SITE}.dA", (8,), "(8,)"),
        (f"{SITE}.dA", (4, 2), "(4, 2)"),
        (f"{SITE}.dA", (2, 4, 1), "(2, 4, 1)"),
        (f"{SITE}.dA", (2, 5), "(3, 5)"),
        (f"{SITE}.dA", (3, 4), "(3, 4)"),
        (f"{SITE}.dA", (0, 4), "(0, 4)"),
        (f"{SITE}.dB", (4, 2), "(4, 4)"),
        (f"{SITE}.A0", (2, 3), "(3, 3)"),
        ("head.A", (), "()"),
    ],
    ids=str,
)
def test_a_tensor_of_another_shape(path, name, shape, word):
    header, tensors = parts(path)
    refused(seal(path, header, tensors | {name: torch.ones(shape)}), HeaderError, word)


@pytest.mark.parametrize("rank", [0, 3])
def test_an_anchor_of_another_rank(path, rank):
    header, tensors = parts(path)
    tensors |= {f"{SITE}.A0": torch.ones(rank, 4), f"{SITE}.B0": torch.ones(3, rank)}
    refused(seal(path, header, tensors), HeaderError, "rank")


def test_a_rank_of_zero(path):
    header, tensors = parts(path)
    tensors |= {"head.A": torch.ones(0, 2), "head.B": torch.ones(2, 0)}
    refused(seal(path, header, tensors), HeaderError, "rank")


@pytest.mark.parametrize(
    ("field", "value", "tensors"),
    [
        ("scaling", -1, {}),
        ("shape", [3, 5], {}),
        ("kind", "sparse", {}),
        ("dropout", "text", {}),
        ("path", SITE, {f"{SITE}.dA": torch.ones(2, 5)}),
        ("path", SITE, {f"{SITE}.A0": torch.ones(1, 4)}),
    ],
    ids=str,
)
def test_the_site_of_a_bad_layer_is_named(path, field, value, tensors):
    header, valid = parts(path)
    seal(path, changed(header, *LAYER, field, to=value), valid | tensors)
    refused(path, HeaderError, repr(SITE))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64],
    ids=str,
)
def test_tensors_of_another_dtype(path, dtype):
    header, tensors = parts(path)
    tensors |= {name: tensors[name].to(dtype) for name in ("head.A", "head.B")}
    refused(seal(path, header, tensors), HeaderError, "'head.A'", str(dtype))


@pytest.mark.parametrize("name", ["head.A", "head.B", f"{SITE}.dB", f"{SITE}.A0"])
def test_float32_and_float64_mixed_in_one_layer(path, name):
    header, tensors = parts(path)
    tensors[name] = tensors[name].double()
    refused(seal(path, header, tensors), HeaderError, "float64")


@pytest.mark.parametrize("name", [f"{SITE}.dA", f"{SITE}.dB", f"{SITE}.A0", f"{SITE}.B0", "head.A"])
def test_tensors_that_are_not_finite(path, name):
    header, tensors = parts(path)
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors[name][0, 1] = value
        refused(seal(path, header, tensors), NonFiniteError, name, "(0, 1)")


ODD_PATHS = ["../../x", "/etc/passwd", "a\nb", "a\0b", "", ".", "x" * 5000, "é😀", "$(x)", "a.A"]


@pytest.mark.parametrize("site", ODD_PATHS, ids=lambda site: repr(site)[:20])
def test_a_site_path_is_a_name_and_never_a_place(path, site):
    header, tensors = parts(path)
    tensors = {n.replace("head", site): t for n, t in tensors.items() if n.startswith("head")}
    header = changed(header, "layers", to=[header["layers"][1] | {"path": site}])
    header["targets"], header["excluded"] = [site], []
    here, around = path.parent, set(path.parent.parent.iterdir())
    adapter = tether.load(seal(path, header, tensors))
    assert list(adapter.layers) == [site]
    with pytest.raises(ConfigError):
        tether.attach(nn.Sequential(nn.Linear(2, 2)), adapter)
    tether.save(adapter, here / "again.safetensors")
    tether.save_as_lora(adapter, here / "lora")
    assert list(tether.load(here / "again.safetensors").layers) == [site]
    assert list(tether.load(here / "lora").layers) == [site]
    assert set(here.iterdir()) == {path, here / "again.safetensors", here / "lora"}
    assert len(list((here / "lora").iterdir())) == 3
    assert set(here.parent.iterdir()) == around


ADVICE = ("Copy", "Download", "Give", "Load", "Read", "Rewrite", "Save", "Use", "Where")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"version": "3"},
        {"adapter": "{"},
        {"adapter": None},
        {"digests": "{}"},
        {"digest": ""},
    ],
    ids=str,
)
def test_every_message_says_what_to_do(path, change):
    header, tensors = parts(path)
    if not change:
        del tensors["head.A"]
    kind = DigestError if "digest" in change else HeaderError
    message = refused(seal(path, header, tensors, **change), kind)
    assert any(f"{verb} " in message.split(": ", 1)[1] for verb in ADVICE), message
