"""The anchor cache: what is found is what was stored, and nothing in it can do harm."""

import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from tether import cache
from tether.cache import AnchorCache, Entry, Key, store
from tether.cache.entry import read
from tether.cache.key import file_name, parse_file_name
from tether.errors import ConfigError, FormatError, NonFiniteError, ShapeMismatchError
from tether.fingerprints import fingerprint_tensor
from tether.formats.native import digest, digest_texts
from tether.layout import Layout
from tether.linalg import Certificate
from tether.methods import Context, Method, Nested
from tether.methods.milora import MiLoRA
from tether.methods.olora import OLoRA
from tether.methods.pissa import PiSSA
from tether.value import Factors

SCALING = 0.7
SHA = "ab" * 32
CERTIFICATE = Certificate("lanczos", 1.5e-6, 2.5e-7, True, "")
NESTED = (PiSSA(), OLoRA(), MiLoRA())
nested = pytest.mark.parametrize("method", NESTED, ids=lambda method: method.name)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A method of somebody else's, that has none of what is optional."""

    std: float = 1.0
    name: ClassVar[str] = "drawn"
    lifts: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        a = self.std * torch.randn(rank, weight.shape[1], generator=context.generator)
        return Factors(a, weight[:, :rank].contiguous())


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch):
    monkeypatch.setattr(store, "_WARNED", set())


@pytest.fixture
def anchors(tmp_path):
    return AnchorCache(tmp_path / "anchors")


@pytest.fixture
def weight():
    return torch.randn(9, 7)


def start(method: Method, weight: Tensor, rank: int, scaling: float = SCALING) -> Factors:
    return method.start(weight.float(), rank, Context("m", scaling, torch.Generator()))


def key_of(weight: Tensor, method: Method, seed: int = 0, kind: Any = "linear") -> Key:
    found = fingerprint_tensor(weight)
    return Key.of(found.sha256, found.shape, found.dtype, kind, method, seed)


def entry_of(weight: Tensor, method: Method, rank: int, scaling: float = SCALING) -> Entry:
    factors = start(method, weight, rank, scaling)
    return Entry(factors, scaling, fingerprint_tensor(weight), CERTIFICATE)


def path_of(anchors: AnchorCache, key: Key, rank: int, scaling: float = SCALING) -> Path:
    return anchors.folder / key.name[:2] / key.name / f"r{rank}-s{scaling}.safetensors"


def same(one: Factors, other: Factors) -> bool:
    return torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


# Keys


def test_a_key_says_all_that_an_anchor_depends_on(weight):
    key = key_of(weight, PiSSA())
    assert json.loads(key.text) == {
        "version": 1,
        "sha256": fingerprint_tensor(weight).sha256,
        "shape": [9, 7],
        "dtype": "float32",
        "kind": "linear",
        "method": "pissa",
        "settings": {"criterion": "product", "tolerance": 1e-5},
        "algorithm": 1,
        "seed": None,
    }
    assert key == key_of(weight.clone(), PiSSA())
    assert " " not in key.text
    assert list(json.loads(key.text)) == sorted(json.loads(key.text))
    assert key.layout == Layout("linear", (9, 7))


def test_every_part_of_a_key_makes_another(monkeypatch):
    def of(sha=SHA, shape=(4, 6), dtype="float32", kind="linear", method=PiSSA(), seed=0):  # noqa: B008
        return Key.of(sha, shape, dtype, kind, method, seed)

    others = [
        of(sha="cd" * 32),
        of(shape=(6, 4)),  # the same bytes
        of(shape=(2, 12)),
        of(dtype="bfloat16"),
        of(kind="transposed"),
        of(kind="embedding"),
        of(method=PiSSA(tolerance=1e-4)),
        of(method=MiLoRA()),
    ]
    assert len({key.name for key in [of(), *others]}) == len(others) + 1
    before = of()
    monkeypatch.setattr(PiSSA, "algorithm", 2, raising=False)
    assert of() != before


def test_the_same_bytes_in_another_dtype_are_another_weight():
    bits = torch.arange(24, dtype=torch.int16).view(4, 6)
    one, other = bits.view(torch.bfloat16), bits.view(torch.float16)
    assert fingerprint_tensor(one).sha256 == fingerprint_tensor(other).sha256
    assert key_of(one, PiSSA()) != key_of(other, PiSSA())


def test_the_seed_counts_only_where_the_start_is_random():
    weight = torch.ones(3, 2)
    for method in NESTED:
        assert key_of(weight, method, seed=1) == key_of(weight, method, seed=2)
    assert key_of(weight, Drawn(), seed=1) != key_of(weight, Drawn(), seed=2)


@nested
def test_a_method_that_says_so_is_deterministic(method, weight):
    one, other = (
        method.start(weight, 3, Context(path, SCALING, torch.Generator().manual_seed(seed)))
        for path, seed in (("a", 1), ("b", 2))
    )
    assert method.deterministic
    assert same(one, other)


@pytest.mark.parametrize("setting", [math.nan, {1}, torch.ones(1)], ids=["nan", "set", "tensor"])
def test_settings_that_are_no_json_are_refused(setting):
    with pytest.raises(ConfigError, match=r"method 'drawn': its settings cannot be named"):
        Key.of(SHA, (3, 2), "float32", "linear", Drawn(setting), 0)


@pytest.mark.parametrize("scaling", [1, 1.0, 0.1, 2 / 3, 1e-5, 1e17, 5e-324])
def test_a_file_name_says_rank_and_scaling_exactly(scaling):
    assert parse_file_name(file_name(16, scaling)) == (16, scaling)
    assert file_name(16, 1) == "r16-s1.0.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "r0-s1.0.safetensors",
            "r01-s1.0.safetensors",
            "r-1-s1.0.safetensors",
            "r1-s1.safetensors",
        ),
        *("r1-s0.0.safetensors", "r1-s-1.0.safetensors", "r1-s1e400.safetensors", "r1.safetensors"),
        *("r1-snan.safetensors", "r1-sinf.safetensors", "r1-s1.00.safetensors", "r1-s1.0.pt"),
        *("r١-s1.0.safetensors", "r1-s1.0.safetensors\n", "r1234567890-s1.0.safetensors"),
        *(
            "R1-s1.0.safetensors",
            "r1-s1_0.0.safetensors",
            "r1-s+1.0.safetensors",
            "r1-se.safetensors",
        ),
    ],
)
def test_other_file_names_are_not_ours(name):
    assert parse_file_name(name) is None


# Cutting


@nested
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("scaling", [SCALING, 3.5])
def test_a_cut_start_is_the_start_of_the_smaller_rank(method, shape, scaling):
    weight = torch.randn(shape)
    large = start(method, weight, 6)
    assert isinstance(method, Nested)
    for rank in (1, 4, 6):
        found = method.cut(large, rank, SCALING, scaling)
        wanted = start(method, weight, rank, scaling)
        # Both are float32 roundings of float64 results that agree much better.
        torch.testing.assert_close(found.A, wanted.A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.B, wanted.B, rtol=1e-5, atol=1e-6)
        for factor, whole in ((found.A, large.A), (found.B, large.B)):
            assert factor.is_contiguous()
            assert factor.data_ptr() != whole.data_ptr()
        columns = Factors(large.A.T.contiguous().T, large.B.T.contiguous().T)
        again = method.cut(columns, rank, SCALING, scaling)
        assert same(again, found)
        assert again.A.is_contiguous()
        assert again.B.is_contiguous()


@nested
def test_a_cut_at_the_same_scaling_rounds_nothing(method, weight):
    large = start(method, weight, 5)
    part = slice(2, 5) if method.name == "milora" else slice(0, 3)
    found = method.cut(large, 3, SCALING, SCALING)
    assert same(found, Factors(large.A[part], large.B[:, part]))
    assert same(method.cut(large, 5, SCALING, SCALING), large)


def test_olora_does_not_know_the_scaling(weight):
    large = start(OLoRA(), weight, 3)
    assert same(OLoRA().cut(large, 3, 1.0, 1e-3), large)


# Finding and storing


@pytest.mark.parametrize("method", [*NESTED, Drawn()], ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_found_is_what_was_stored(anchors, weight, method, dtype):
    weight = weight.to(dtype)
    key, entry = key_of(weight, method), entry_of(weight, method, 3)
    assert anchors.find(key, 3, SCALING, method) is None
    assert anchors.store(key, entry) is True
    found = anchors.find(key, 3, SCALING, method)
    assert same(found.factors, entry.factors)
    assert found.scaling == SCALING
    assert found.fingerprint == entry.fingerprint
    assert found.fingerprint.norm == entry.fingerprint.norm
    assert found.certificate == CERTIFICATE
    assert files(anchors.folder) == [f"{key.name[:2]}/{key.name}/r3-s0.7.safetensors"]


def test_a_found_start_has_memory_of_its_own(anchors, weight):
    key = key_of(weight, PiSSA())
    anchors.store(key, entry_of(weight, PiSSA(), 3))
    before = path_of(anchors, key, 3).read_bytes()
    anchors.find(key, 3, SCALING, PiSSA()).factors.A.zero_()
    assert path_of(anchors, key, 3).read_bytes() == before
    assert anchors.find(key, 3, SCALING, PiSSA()).factors.A.any()


def test_a_found_start_does_not_change_with_its_file(anchors, weight):
    key, entry = key_of(weight, PiSSA()), entry_of(weight, PiSSA(), 3)
    anchors.store(key, entry)
    path = path_of(anchors, key, 3)
    found = anchors.find(key, 3, SCALING, PiSSA())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(found.factors, entry.factors)


def test_factors_that_share_memory_or_are_views_are_stored_by_value(anchors):
    square = torch.arange(16.0).view(4, 4)
    weight = torch.ones(4, 4)
    entry = Entry(Factors(square, square.T), 1, fingerprint_tensor(weight))
    assert anchors.store(key_of(weight, PiSSA()), entry)
    found = anchors.find(key_of(weight, PiSSA()), 4, 1.0, PiSSA())
    assert same(found.factors, entry.factors)
    assert found.certificate is None


def test_the_smallest_that_is_large_enough_is_cut(anchors, weight):
    key, method = key_of(weight, PiSSA()), PiSSA()
    # Each entry is recognised by its values: a multiple of the true start.
    for factor, (rank, scaling) in enumerate([(6, 0.7), (5, 1.4), (5, 0.7), (2, 0.7)], start=1):
        entry = entry_of(weight, method, rank, scaling)
        multiple = Factors(entry.factors.A * 2**factor, entry.factors.B)
        anchors.store(key, dataclasses.replace(entry, factors=multiple))

    def found(rank: int, scaling: float) -> tuple[float, Certificate | None]:
        entry = anchors.find(key, rank, scaling, method)
        assert (entry.factors.rank, entry.scaling) == (rank, scaling)
        assert entry.fingerprint == fingerprint_tensor(weight)
        ratio = entry.factors.A / start(method, weight, rank, scaling).A
        return math.log2(float(ratio.median())), entry.certificate

    near = pytest.approx
    assert found(2, 0.7) == (near(4, abs=1e-4), CERTIFICATE)  # itself
    assert found(2, 1.4) == (near(4, abs=1e-4), CERTIFICATE)  # the same rank
    assert found(3, 0.7) == (near(3, abs=1e-4), None)  # of two of rank 5 that needs no rounding
    assert found(3, 1.4) == (near(2, abs=1e-4), None)
    assert found(5, 1.4) == (near(2, abs=1e-4), CERTIFICATE)
    assert found(6, 9.0) == (near(1, abs=1e-4), CERTIFICATE)
    assert anchors.find(key, 7, 0.7, method) is None
    path_of(anchors, key, 5, 0.7).write_bytes(b"damaged")
    assert found(3, 0.7) == (near(2, abs=1e-4), None)
    path_of(anchors, key, 5, 1.4).unlink()
    assert found(3, 0.7) == (near(1, abs=1e-4), None)


def test_a_method_that_cannot_cut_is_found_exactly_or_not(anchors, weight):
    key = key_of(weight, Drawn())
    anchors.store(key, entry_of(weight, Drawn(), 4))
    assert anchors.find(key, 4, SCALING, Drawn()) is not None
    assert anchors.find(key, 3, SCALING, Drawn()) is None
    assert anchors.find(key, 4, 2 * SCALING, Drawn()) is None


def test_scalings_too_far_apart_to_be_changed_are_not_found(anchors, weight):
    key = key_of(weight, PiSSA())
    anchors.store(key, entry_of(weight, PiSSA(), 4, 1e20))
    assert anchors.find(key, 4, 1e20, PiSSA()) is not None
    assert anchors.find(key, 4, 1e-300, PiSSA()) is None


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        Certificate("dense", 0.0, -1e-9, False, "rank 60 of 64"),
        Certificate("gram", math.inf, math.nan, True),
    ],
)
def test_a_certificate_is_kept(anchors, weight, certificate):
    key = key_of(weight, PiSSA())
    entry = dataclasses.replace(entry_of(weight, PiSSA(), 2), certificate=certificate)
    assert anchors.store(key, entry)
    found = anchors.find(key, 2, SCALING, PiSSA()).certificate
    if certificate is not None and not math.isfinite(certificate.excess):
        assert math.isnan(found.product_error)
        assert math.isnan(found.excess)
        found = dataclasses.replace(found, product_error=math.inf, excess=certificate.excess)
    assert found == certificate


def test_an_entry_of_another_weight_is_refused(anchors, weight):
    entry = entry_of(weight, PiSSA(), 2)
    for other in (weight.T.contiguous(), weight + 1, weight.bfloat16()):
        with pytest.raises(ShapeMismatchError, match="the key's weight"):
            anchors.store(key_of(other, PiSSA()), entry)
    for shape, rank in (((9, 7), 8), ((7, 9), 2)):
        wrong = Factors(torch.ones(rank, shape[1]), torch.ones(shape[0], rank))
        with pytest.raises(ShapeMismatchError, match=re.escape(f"rank {rank} for {shape}")):
            anchors.store(key_of(weight, PiSSA()), dataclasses.replace(entry, factors=wrong))
    assert not anchors.folder.exists()


def test_what_a_file_cannot_hold_is_not_stored(anchors, weight):
    key, entry = key_of(weight, PiSSA()), entry_of(weight, PiSSA(), 2)
    double = Factors(entry.factors.A.double(), entry.factors.B.double())
    nan = Factors(entry.factors.A * math.nan, entry.factors.B)
    norm = dataclasses.replace(entry.fingerprint, norm=math.inf)
    for change in ({"factors": double}, {"factors": nan}, {"fingerprint": norm}, {"scaling": 0.0}):
        assert anchors.store(key, dataclasses.replace(entry, **change)) is False
    assert not anchors.folder.exists()


def test_a_hit_is_a_use_of_the_file_it_came_from(anchors, weight):
    key = key_of(weight, PiSSA())
    paths = [path_of(anchors, key, rank) for rank in (3, 5)]
    for rank, path in zip((3, 5), paths, strict=True):
        anchors.store(key, entry_of(weight, PiSSA(), rank))
        os.utime(path, (1000, 1000))
    anchors.find(key, 6, SCALING, PiSSA())
    assert [path.stat().st_mtime for path in paths] == [1000, 1000]
    anchors.find(key, 4, SCALING, PiSSA())
    assert paths[0].stat().st_mtime == 1000
    assert abs(time.time() - paths[1].stat().st_mtime) < 60
    anchors.find(key, 3, SCALING, PiSSA())
    assert abs(time.time() - paths[0].stat().st_mtime) < 60


def test_a_file_of_somebody_else_is_a_hit_all_the_same(anchors, weight, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    key = key_of(weight, PiSSA())
    anchors.store(key, entry_of(weight, PiSSA(), 3))
    monkeypatch.setattr(os, "utime", refused)
    assert anchors.find(key, 3, SCALING, PiSSA()) is not None


# Bad entries


def change(path: Path, **changes: Any) -> None:
    """Write an entry anew, its digests right, with other tensors, fields or metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | changes.pop("tensors", {})
    fields = json.loads(metadata["entry"])
    fields["digests"] = {name: digest(tensors[name]) for name in "AB" if name in tensors}
    fields |= changes.pop("fields", {})
    text = changes.pop("text", json.dumps(fields))
    metadata |= {"entry": text, "digest": digest_texts(text)} | changes.pop("metadata", {})
    assert not changes
    path.unlink()
    save_file(tensors, path, metadata)


def with_fields(**fields: Any) -> Callable[[Path], None]:
    return lambda path: change(path, fields=fields)


def in_table(name: str, **fields: Any) -> Callable[[Path], None]:
    """Other fields within `fingerprint` or `certificate`; None of a name removes it."""

    def act(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            old = json.loads(file.metadata()["entry"])[name]
        change(path, fields={name: {k: v for k, v in (old | fields).items() if v is not ...}})

    return act


def flipped(at: int) -> Callable[[Path], None]:
    """One bit of the file; from the end if negative."""

    def act(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)

    return act


def in_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        raw = path.read_bytes()
        assert raw.count(old) == 1
        path.write_bytes(raw.replace(old, new))

    return act


def rekeyed(**values: Any) -> Callable[[Path], None]:
    """A key with other values in the place of the right one."""

    def act(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            key = json.loads(json.loads(file.metadata()["entry"])["key"])
        text = json.dumps(key | values, sort_keys=True, separators=(",", ":"))
        change(path, fields={"key": text})

    return act


def moved_to(name: str) -> Callable[[Path], None]:
    return lambda path: path.rename(path.with_name(name)) and None


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.unlink()
        make(path)

    return act


def without_b(path: Path) -> None:
    """Without B, all else as it was."""
    with safe_open(path, framework="pt") as file:
        metadata, a = file.metadata(), file.get_tensor("A").clone()
    path.unlink()
    save_file({"A": a}, path, metadata)


def pointed(path: Path) -> None:
    """A link to a good entry elsewhere."""
    path.rename(path.parents[3] / "elsewhere.safetensors")
    path.symlink_to(path.parents[3] / "elsewhere.safetensors")


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_text("not an entry"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"A": 1})),
    "torch.save": lambda path: torch.save({"A": torch.ones(2)}, path),
    "header size": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "bit of a tensor": flipped(-1),
    "bit of the header": flipped(60),
    "header lies about shape": in_header(b'"shape":[3,7]', b'"shape":[7,3]'),
    "header lies about dtype": in_header(b'"F32","shape":[3,7]', b'"I32","shape":[3,7]'),
    "nan": lambda path: change(path, tensors={"A": torch.full((3, 7), math.nan)}),
    "inf": lambda path: change(path, tensors={"B": torch.full((9, 3), math.inf)}),
    "float64": lambda path: change(path, tensors={"A": torch.ones(3, 7).double()}),
    "another rank": lambda path: change(
        path, tensors={"A": torch.ones(2, 7), "B": torch.ones(9, 2)}
    ),
    "factors swapped": lambda path: change(
        path, tensors={"A": torch.ones(9, 3), "B": torch.ones(3, 7)}
    ),
    "a tensor more": lambda path: change(path, tensors={"C": torch.ones(1)}),
    "a tensor less": without_b,
    "no metadata": replaced(lambda path: save_file({"A": torch.ones(3, 7)}, path)),
    "format": lambda path: change(path, metadata={"format": "tether"}),
    "metadata more": lambda path: change(path, metadata={"more": ""}),
    "digest of the metadata": lambda path: change(path, metadata={"digest": SHA}),
    "digest of a tensor": with_fields(digests={"A": SHA, "B": SHA}),
    "digests missing": with_fields(digests={"A": SHA}),
    "digests more": with_fields(digests={"A": SHA, "B": SHA, "C": SHA}),
    "digests are numbers": with_fields(digests={"A": 1, "B": 2}),
    "fields are a list": lambda path: change(path, text="[]"),
    "not json": lambda path: change(path, text="{"),
    "deep json": lambda path: change(path, text="[" * 10**5),
    "field more": with_fields(more=1),
    "key is null": with_fields(key=None),
    "key is no json": with_fields(key="{"),
    "key of another weight": rekeyed(sha256=SHA),
    "key of another method": rekeyed(settings={"tolerance": 1.0}),
    "scaling is a text": with_fields(scaling="0.7"),
    "scaling is whole": with_fields(scaling=1),
    "scaling is another": with_fields(scaling=0.8),
    "fingerprint is null": with_fields(fingerprint=None),
    "fingerprint lacks a field": in_table("fingerprint", norm=...),
    "fingerprint of a number": in_table("fingerprint", sha256_float16=7),
    "fingerprint of words": in_table("fingerprint", sha256_float16="../../etc"),
    "norm is true": in_table("fingerprint", norm=True),
    "norm is negative": in_table("fingerprint", norm=-1.0),
    "norm is nan": in_table("fingerprint", norm=math.nan),
    "certificate is a list": with_fields(certificate=[]),
    "certificate lacks a field": in_table("certificate", unique=...),
    "certificate of a number": in_table("certificate", unique=1),
    "certificate of a text": in_table("certificate", excess="0"),
    "certificate with an escape": in_table("certificate", fallback="\x1b[2J"),
    "a folder": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to a folder": replaced(lambda path: path.symlink_to(path.parent)),
    "a link": pointed,
}
hostile = pytest.mark.parametrize("harm", HOSTILE.values(), ids=HOSTILE)


@pytest.fixture
def stored(anchors, weight):
    """(path, key) of one entry of rank 3."""
    key = key_of(weight, PiSSA())
    anchors.store(key, entry_of(weight, PiSSA(), 3))
    return path_of(anchors, key, 3), key


def test_a_file_written_anew_is_still_good(stored):
    # Else every case below would be refused for a reason of the test's own.
    path, _ = stored
    change(path)
    assert read(path).certificate == CERTIFICATE
    in_table("certificate")(path)
    rekeyed()(path)
    assert read(path).scaling == SCALING


@hostile
def test_a_bad_entry_is_as_good_as_missing(anchors, weight, stored, harm):
    path, key = stored
    harm(path)
    for rank in (3, 2):
        assert anchors.find(key, rank, SCALING, PiSSA()) is None
    with pytest.raises((FormatError, NonFiniteError)):
        read(path)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "a folder"])
def test_a_bad_entry_is_replaced(anchors, weight, stored, name):
    path, key = stored
    HOSTILE[name](path)
    elsewhere = path.parents[3] / "elsewhere.safetensors"
    before = elsewhere.exists() and elsewhere.read_bytes()
    entry = entry_of(weight, PiSSA(), 3)
    entry.factors.A.add_(1)
    assert anchors.store(key, entry)
    assert same(anchors.find(key, 3, SCALING, PiSSA()).factors, entry.factors)
    # A link was replaced, not written through.
    assert (elsewhere.exists() and elsewhere.read_bytes()) == before
    assert not path.is_symlink()


@pytest.mark.parametrize("rank", [4, 7, 8, 999999999])
def test_the_rank_of_the_name_is_not_believed(anchors, stored, rank):
    path, key = stored
    path.rename(path.with_name(f"r{rank}-s0.7.safetensors"))
    for wanted in (1, 3, rank):
        assert anchors.find(key, wanted, SCALING, PiSSA()) is None


def test_no_rank_is_larger_than_the_matrix(anchors, stored):
    path, key = stored
    change(path, tensors={"A": torch.ones(8, 7), "B": torch.ones(9, 8)})
    path.rename(path.with_name("r8-s0.7.safetensors"))
    assert anchors.find(key, 8, SCALING, PiSSA()) is None


def test_the_scaling_of_the_name_is_not_believed(anchors, stored):
    path, key = stored
    path.rename(path.with_name("r3-s1.4.safetensors"))
    assert anchors.find(key, 3, 1.4, PiSSA()) is None
    assert anchors.find(key, 3, SCALING, PiSSA()) is None


def test_an_entry_in_the_place_of_another_key_is_not_believed(anchors, weight, stored):
    other = key_of(weight + 1, PiSSA())
    place = path_of(anchors, other, 3)
    place.parent.mkdir(parents=True)
    place.write_bytes(stored[0].read_bytes())
    assert anchors.find(other, 3, SCALING, PiSSA()) is None
    with pytest.raises(FormatError, match="of another key than its place says"):
        read(place)


def test_a_half_precision_digest_must_be_the_keys_own(anchors, weight):
    weight = weight.bfloat16()
    key = key_of(weight, PiSSA())
    anchors.store(key, entry_of(weight, PiSSA(), 3))
    in_table("fingerprint", sha256_bfloat16=SHA)(path_of(anchors, key, 3))
    assert anchors.find(key, 3, SCALING, PiSSA()) is None


@pytest.mark.parametrize(
    "values",
    [
        {"version": 2},
        {"version": True},
        {"sha256": "../" * 21 + "a"},
        {"shape": [9, True]},
        {"shape": [9, 7.0]},
        {"shape": [9]},
        {"shape": [9, -7]},
        {"kind": "round"},
        {"kind": ["linear"]},
        {"dtype": None},
        {"seed": 0.5},
        {"more": 1},
        {"kind": "conv"},  # of two dimensions
        *({"settings": json.loads('{"a":' * n + "0" + "}" * n)} for n in (100, 300, 450)),
    ],
    ids=str,
)
def test_a_key_that_an_entry_names_itself_is_checked(stored, values):
    path, key = stored
    text = json.dumps(json.loads(key.text) | values, sort_keys=True, separators=(",", ":"))
    # In the folder that such a key would have.
    change(path, fields={"key": text})
    place = path.parents[2] / Key(text).name[:2] / Key(text).name / path.name
    place.parent.mkdir(parents=True)
    path.rename(place)
    if "settings" in values:
        assert read(place).scaling == SCALING
        return
    with pytest.raises(FormatError):
        Key.parse(text, "key")
    with pytest.raises(FormatError):
        read(place)


def test_a_key_must_be_canonical(stored):
    path, key = stored
    text = json.dumps(json.loads(key.text))
    change(path, fields={"key": text})
    place = path.parents[2] / Key(text).name[:2] / Key(text).name / path.name
    place.parent.mkdir(parents=True)
    path.rename(place)
    with pytest.raises(FormatError, match="is not canonical JSON"):
        read(place)


def test_settings_nested_to_any_depth_are_an_entry_or_refused(stored):
    # The depth that Python follows is not the same for reading, writing and showing.
    path, key = stored
    whole = path.read_bytes()
    for depth in range(930, 1000):
        settings = json.dumps(key.values["settings"], separators=(",", ":"))
        text = key.text.replace(settings, '{"a":' * depth + "0" + "}" * depth)
        assert text != key.text
        path.write_bytes(whole)
        change(path, fields={"key": text})
        place = path.parents[2] / Key(text).name[:2] / Key(text).name / path.name
        place.parent.mkdir(parents=True)
        path.rename(place)
        with suppress(FormatError):
            assert read(place).scaling == SCALING


# The folder


def test_an_unreadable_folder_is_a_miss(weight, tmp_path):
    (tmp_path / "anchors").write_text("a file")
    key = key_of(weight, PiSSA())
    assert AnchorCache(tmp_path / "anchors").find(key, 3, SCALING, PiSSA()) is None


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "words"), [(28, "No space left"), (30, "Read-only"), (13, "Permission denied")]
)
def test_not_being_able_to_store_is_told_once(anchors, weight, monkeypatch, number, words):
    monkeypatch.setattr("tether.cache.entry.save_file", failing(number))
    key, entry = key_of(weight, PiSSA()), entry_of(weight, PiSSA(), 3)
    with pytest.warns(UserWarning, match=words) as told:
        assert anchors.store(key, entry) is False
    (warning,) = told
    for word in (str(anchors.folder), words, "TETHER_NO_CACHE=1"):
        assert word in str(warning.message)
    assert warning.filename == __file__
    assert anchors.store(key, entry) is False  # a second warning would be an error here
    assert files(anchors.folder) == []


def test_a_folder_in_place_of_the_file_stays(anchors, weight, stored):
    path, key = stored
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        assert anchors.store(key, entry_of(weight, PiSSA(), 3)) is False
    assert path.is_dir()


def test_a_failed_write_leaves_the_old_entry(anchors, weight, stored, monkeypatch):
    path, key = stored
    before = path.read_bytes()
    monkeypatch.setattr("tether.cache.entry.save_file", failing(28))
    with pytest.warns(UserWarning, match="No space left"):
        anchors.store(key, entry_of(weight, PiSSA(), 3))
    assert path.read_bytes() == before
    assert len(files(anchors.folder)) == 1


def test_a_folder_that_prune_removed_meanwhile_is_made_again(anchors, weight, monkeypatch):
    key, original, calls = key_of(weight, PiSSA()), store.write, []

    def write(path: Path, key: Key, entry: Entry) -> None:
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
            path.parent.rmdir()
            raise FileNotFoundError(2, "No such file or directory")
        original(path, key, entry)

    monkeypatch.setattr(store, "write", write)
    assert anchors.store(key, entry_of(weight, PiSSA(), 3))
    assert anchors.find(key, 3, SCALING, PiSSA()) is not None


def test_nothing_waits_for_the_disk(anchors, weight, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(5))
    assert anchors.store(key_of(weight, PiSSA()), entry_of(weight, PiSSA(), 3))


def test_an_entry_that_is_removed_while_it_is_opened_is_a_miss(
    anchors, weight, stored, monkeypatch
):
    path, key = stored
    original = torch.UntypedStorage.from_file

    def mapped_too_late(*arguments: object, **options: object) -> object:
        path.unlink()
        return original(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", mapped_too_late)
    assert anchors.find(key, 3, SCALING, PiSSA()) is None


RACE = """
import sys, torch
from pathlib import Path
from tether.cache import AnchorCache, Entry, Key, prune, verify
from tether.fingerprints import fingerprint_tensor
from tether.methods.pissa import PiSSA
from tether.value import Factors

folder, mark = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
weight = torch.ones(64, 64)
origin = fingerprint_tensor(weight)
key = Key.of(origin.sha256, origin.shape, origin.dtype, "linear", PiSSA(), 0)
anchors = AnchorCache(folder)
entry = Entry(Factors(torch.full((8, 64), mark), torch.full((64, 8), mark)), 1.0, origin)
print("ready", flush=True)
sys.stdin.readline()
hits = 0
for turn in range(60):
    assert anchors.store(key, entry)
    found = anchors.find(key, 8, 1.0, PiSSA())
    if found is not None:
        hits += 1
        values = set(found.factors.A.flatten().tolist() + found.factors.B.flatten().tolist())
        assert len(values) == 1 and values <= {1.0, 2.0, 3.0}, values
    if turn % 10 == 9:
        prune(folder, 0)
        assert verify(folder).bad == ()
print(hits)
"""


def test_processes_that_store_find_and_prune_at_once_see_whole_entries(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RACE, str(tmp_path / "anchors"), str(mark)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mark in (1, 2, 3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert int(out) > 0


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "{home}/.cache/tether/anchors"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/tether/anchors"),
        ({"TETHER_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own/anchors"),
        ({"TETHER_CACHE": ""}, "{home}/.cache/tether/anchors"),
    ],
)
def test_the_folder_is_where_the_variables_say(variables, wanted, monkeypatch, tmp_path):
    for name in ("TETHER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    assert cache.folder() == Path(wanted.format(home=tmp_path))


def test_it_is_switched_off_by_a_variable(monkeypatch):
    assert not cache.enabled()  # in all tests
    monkeypatch.delenv("TETHER_NO_CACHE")
    assert cache.enabled()
    for value, wanted in (("", True), ("0", True), ("1", False), ("no", False)):
        monkeypatch.setenv("TETHER_NO_CACHE", value)
        assert cache.enabled() is wanted


def test_without_a_home_folder_it_is_off(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TETHER_CACHE", "XDG_CACHE_HOME", "TETHER_NO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert not cache.enabled()
    with pytest.raises(ConfigError, match=r"no cache folder.*Set TETHER_CACHE"):
        cache.folder()
