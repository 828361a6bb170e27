"""Rescuing a residual adapter: the numbers, the files, and what is refused.

Adapters of peft itself are in tests/peers.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS
from laws.cases import factors_of, truth
from residual_files import SHAPES, files, same, start_of, worst, written
from tether import Factors, algebra, rescue
from tether.errors import (
    ConfigError,
    ConvergenceError,
    HeaderError,
    NonFiniteError,
    PickleRefusedError,
    RescueError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedAdapterError,
)
from tether.fingerprints import fingerprint_tensor
from tether.rescue import product

F64 = torch.float64


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("kind", ["pissa", "olora", "small"])
def test_no_cancellation_at_any_size(kind: str, size: float, tmp_path: Path) -> None:
    """With models in float64, where P is exact: what remains is float32 rounding of ΔW itself."""
    made = files(tmp_path, kind, size, F64)
    adapter = rescue.load(made.adapter, **made.given("residual"))
    assert worst(adapter, made) < 3e-7
    for site, layer in adapter.layers.items():
        # No longer than the displacement that training really made.
        tensors = [load_file(made.root / name / WEIGHTS) for name in ("adapter", "start")]
        moved = [
            float((tensors[0][key].double() - tensors[1][key].double()).norm())
            for key in (f"{PREFIX}{site}.lora_A.weight", f"{PREFIX}{site}.lora_B.weight")
        ]
        found = [float(layer.trainable.A.norm()), float(layer.trainable.B.norm())]
        assert torch.tensor(found).norm() < 1.01 * torch.tensor(moved).norm()
    tether.save_as_lora(adapter, tmp_path / "half", dtype=torch.bfloat16)
    assert worst(tether.load(tmp_path / "half"), made) < 4e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_factors_whatever_the_gauge(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    b0, a0 = (torch.randn(shape, generator=g, dtype=F64) for shape in ((9, 4), (4, 11)))
    b0 = b0 * torch.tensor([1.0, 1e-2, 1.0, 1e2], dtype=F64)
    trained = Factors(
        a0 + 1e-3 * torch.randn(4, 11, generator=g, dtype=F64),
        b0 + 1e-3 * torch.randn(9, 4, generator=g, dtype=F64),
    )
    moved = (trained.A - a0).square().sum() + (trained.B - b0).square().sum()
    part = product.of_factors(Factors(a0, b0), 0.5)
    found = product.nearest(part, trained, 0.5)
    assert (found.B @ found.A - b0 @ a0).norm() < 1e-13 * (b0 @ a0).norm()
    near = (trained.A - found.A).square().sum() + (trained.B - found.B).square().sum()
    assert near < moved
    # No other gauge near it is nearer.
    for step in (1e-4, -1e-4):
        turn = torch.eye(4, dtype=F64) + step * torch.randn(4, 4, generator=g, dtype=F64)
        b, a = found.B @ turn, torch.linalg.solve(turn, found.A)
        assert near < (trained.A - a).square().sum() + (trained.B - b).square().sum() + 1e-9 * near


def test_factors_that_have_no_nearest_start_are_refused() -> None:
    part = product.of_factors(Factors(torch.eye(2, 5), torch.eye(6, 2)), 1.0)
    nowhere = Factors(torch.zeros(2, 5), torch.zeros(6, 2))
    with pytest.raises(ConvergenceError, match="too far from their start"):
        product.nearest(part, nowhere, 1.0)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "real"),
    [(40, 30, 4, 4), (30, 40, 4, 4), (1, 17, 1, 1), (17, 1, 1, 1), (12, 12, 12, 12), (40, 30, 6, 3),
     (2000, 700, 3, 3)],
)  # fmt: skip
def test_the_product_of_a_difference(
    rows: int, columns: int, rank: int, real: int, dtype: torch.dtype
) -> None:
    """Beside the whole SVD; `real` is the rank there is, `rank` the one looked for."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=g, dtype=F64).to(dtype)
    b, a = (torch.randn(s, generator=g, dtype=F64) for s in ((rows, real), (real, columns)))
    residual = (base.double() - b @ a).to(dtype)
    whole = base.double() - residual.double()
    far = Factors(torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g))
    found = product.of_difference(base, residual, far)
    assert len(found.s) == real
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    wanted = u[:, :real] * s[:real] @ vt[:real]
    assert (found.u * found.s @ found.vt - wanted).norm() < 1e-10 * wanted.norm()
    left = float((whole - wanted).norm())
    assert found.left_over == pytest.approx(left, rel=1e-6, abs=1e-13 * float(wanted.norm()))
    assert found.left_over <= found.noise + 1e-13 * float(wanted.norm())
    strided = product.of_difference(base.T.contiguous().T, residual.T.contiguous().T, far)
    assert torch.allclose(strided.s, found.s, rtol=1e-12)


def test_no_difference_is_no_anchor() -> None:
    weight = torch.randn(6, 5)
    found = product.of_difference(weight, weight, Factors(torch.randn(2, 5), torch.randn(6, 2)))
    assert (len(found.s), found.norm, found.left_over) == (0, 0.0, 0.0)
    start = product.nearest(found, Factors(torch.randn(2, 5), torch.randn(6, 2)), 1.0)
    assert not start.A.any()
    assert not start.B.any()
    assert (start.shape, start.rank) == ((6, 5), 2)


SOURCES = ("anchor", "residual", "base")


@pytest.mark.parametrize("source", SOURCES)
def test_a_native_file_written_site_by_site_is_what_load_gives(source: str, tmp_path: Path) -> None:
    made = files(tmp_path)
    value = rescue.load(made.adapter, **made.given(source))
    report = rescue.write(made.open(source), tmp_path / "out.safetensors")
    again = tether.load(tmp_path / "out.safetensors")
    assert same(factors_of(again), factors_of(value))
    assert again.provenance == value.provenance
    assert (again.targets, again.excluded) == (value.targets, value.excluded) == (("p", "q"), ())
    for path, layer in again.layers.items():
        mine = value.layers[path]
        assert (layer.scaling, layer.layout, layer.dropout) == (2.0, mine.layout, mine.dropout)
    assert (report.format, report.dtype, report.rank) == ("native", "float32", 3)
    assert report.error < 1e-15
    assert again.provenance.method == "pissa"
    assert again.provenance.base_model == "org/base"
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert again.provenance.fingerprints == (
        {}
        if source == "anchor"
        else {path: fingerprint_tensor(base[f"{path}.weight"]) for path in again.layers}
    )


def test_the_base_adds_fingerprints_to_an_anchor(tmp_path: Path) -> None:
    made = files(tmp_path)
    value = rescue.load(made.adapter, **made.given("anchor"), base=tmp_path / "base")
    assert value.provenance.fingerprints.keys() == SHAPES.keys()
    plain = rescue.load(made.adapter, **made.given("anchor"))
    assert same(factors_of(value), factors_of(plain))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4},
        {"rank": 100},
        {"tolerance": 0.3},
        {"rank": 5, "tolerance": 0.5},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "rank": 2},
    ],
    ids=str,
)
def test_a_folder_written_site_by_site_is_what_save_as_lora_writes(
    options: dict, source: str, tmp_path: Path
) -> None:
    """Written directly, from what `load` gives, and from a native file of it: one and the same."""
    made = files(tmp_path)
    value = rescue.load(made.adapter, **made.given(source))
    seen = []
    report = rescue.write(
        made.open(source), tmp_path / "a", **options, progress=lambda *now: seen.append(now)
    )
    wanted = tether.save_as_lora(value, tmp_path / "b", **options)
    tether.save(value, tmp_path / "native.safetensors")
    tether.save_as_lora(tether.load(tmp_path / "native.safetensors"), tmp_path / "c", **options)
    assert same(written(tmp_path / "a"), written(tmp_path / "b"))
    assert same(written(tmp_path / "a"), written(tmp_path / "c"))
    assert (report.rank, report.dtype) == (wanted.rank, wanted.dtype)
    assert report.error == pytest.approx(wanted.error, rel=1e-6)
    for path, site in report.sites.items():
        assert site.rank == wanted.sites[path].rank
        assert (site.norm, site.error) == pytest.approx(
            (wanted.sites[path].norm, wanted.sites[path].error), rel=1e-6
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_native_file_of_smaller_rank_is_plain(tmp_path: Path) -> None:
    made = files(tmp_path)
    value = algebra.to_lora(rescue.load(made.adapter, **made.given("anchor")), tolerance=0.3)
    rescue.write(made.open("anchor"), tmp_path / "out.safetensors", tolerance=0.3)
    again = tether.load(tmp_path / "out.safetensors")
    assert not again.anchored
    assert same(factors_of(again), factors_of(value))


@pytest.mark.parametrize("size", [0.05, 1e-4])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_uncertainty_of_a_start_computed_again(kind: str, size: float, tmp_path: Path) -> None:
    """Beside the error of one that was computed in float32, as peft does."""
    made = files(tmp_path, kind, size)
    base = load_file(tmp_path / "base" / "model.safetensors")
    start = load_file(tmp_path / "start" / WEIGHTS)
    for site in SHAPES:
        b, a = start_of(base[f"{site}.weight"], 3, kind)
        start |= {f"{PREFIX}{site}.lora_A.weight": a.contiguous()}
        start |= {f"{PREFIX}{site}.lora_B.weight": b.contiguous()}
    save_file(start, tmp_path / "start" / WEIGHTS)
    exact = rescue.load(made.adapter, anchor=tmp_path / "start")
    for site in made.open("base").sites():
        wanted, report = truth(exact.layers[site.path]), site.report
        error = float((truth(site.layer) - wanted).norm() / wanted.norm())
        assert 0.02 * report.uncertainty < error < 2 * report.uncertainty
        assert report.change == pytest.approx(float(wanted.norm()), rel=1e-2)
        weight = base[f"{site.path}.weight"]
        if kind == "pissa":
            s = torch.linalg.svdvals(weight)
            assert report.gap == pytest.approx(float(1 - s[3] / s[2]), rel=1e-4)
        else:
            s = torch.linalg.svdvals(weight[:, :3])
            assert report.gap == pytest.approx(float(s[2] / s[0]), rel=1e-4)


def test_the_uncertainty_of_a_residual_is_what_is_left_over(tmp_path: Path) -> None:
    made = files(tmp_path, dtype=torch.bfloat16)
    for site in made.open("residual").sites():
        wanted, report = made.change[site.path], site.report
        error = float((truth(site.layer) - wanted).norm() / wanted.norm())
        assert report.uncertainty == pytest.approx(error, rel=0.05)
        assert report.left_over == pytest.approx(error * report.change / report.anchor, rel=0.05)
        assert report.gap is None


def test_a_flat_spectrum_does_not_tell_a_pissa_start(tmp_path: Path) -> None:
    made = files(tmp_path, flat=True)
    with pytest.raises(RescueError, match=r"may be wrong by .*, gap .*e-|did not start there"):
        rescue.load(made.adapter, **made.given("base"))
    assert worst(rescue.load(made.adapter, **made.given("residual")), made) < 1e-5
    assert worst(rescue.load(made.adapter, **made.given("anchor")), made) < 1e-5


def test_too_small_a_change_for_a_start_computed_again(tmp_path: Path) -> None:
    made = files(tmp_path, size=1e-6)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG).write_text("an older adapter")
    with pytest.raises(
        RescueError, match=r"adapter: the start .* may be wrong by \d+% of so small"
    ):
        rescue.write(made.open("base"), tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == [CONFIG]  # as it was
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "adapter",
        "base",
        "out",
        "residual",
        "start",
    ]


def test_dependent_columns_do_not_tell_an_olora_start(tmp_path: Path) -> None:
    made = files(tmp_path, "olora")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.p.weight"][:, 1] = 2 * tensors["layers.0.p.weight"][:, 0]
    save_file(tensors, path)
    with pytest.raises(RescueError, match=r"'layers\.0\.p': the first 3 columns .* dependent"):
        rescue.load(made.adapter, base=tmp_path / "base")


def test_a_residual_too_coarse_for_its_anchor(tmp_path: Path) -> None:
    made = files(tmp_path, "small", dtype=torch.bfloat16)
    with pytest.raises(RescueError, match="stored too coarsely for so small an anchor"):
        rescue.load(made.adapter, **made.given("residual"))


@pytest.mark.parametrize("scaling", [0.99, 2.0])
def test_a_residual_of_something_else(scaling: float, tmp_path: Path) -> None:
    made = files(tmp_path)
    path = tmp_path / "residual" / "model.safetensors"
    save_file({name: scaling * t for name, t in load_file(path).items()}, path)
    with pytest.raises(
        RescueError, match=r"not of rank 3: .*% of it is left over.*residual is not"
    ):
        rescue.load(made.adapter, **made.given("residual"))


def _edit(folder: Path, changes: dict) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop(folder: Path, site: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if f".{site}." not in k}, folder / WEIGHTS)


def _replace(folder: Path, key: str, tensor: Tensor) -> None:
    path = next(folder.glob("*.safetensors"))
    save_file(load_file(path) | {key: tensor}, path)


Q = "layers.0.q"
A = f"{PREFIX}{Q}.lora_A.weight"
B = f"{PREFIX}{Q}.lora_B.weight"
MISFITS = {
    "scaling": ("anchor", lambda r: _edit(r / "start", {"lora_alpha": 3}), RescueError,
                r"'layers\.0\.p': the scaling is 2\.0 in .*adapter, 1\.0 in .*start"),
    "a site less": ("anchor", lambda r: _drop(r / "start", Q), RescueError,
                    r"'layers\.0\.q': is in .*adapter, not in .*start"),
    "a site more": ("anchor", lambda r: _drop(r / "adapter", Q), RescueError,
                    r"'layers\.0\.q': is in .*start, not in .*adapter"),
    "layout": ("anchor", lambda r: _edit(r / "start", {"fan_in_fan_out": True}), RescueError,
               r"the weight's shape is Layout\(kind='linear'.* Layout\(kind='transposed'"),
    "rank": ("anchor", lambda r: (_replace(r / "start", A, torch.ones(2, 16)),
                                  _replace(r / "start", B, torch.ones(24, 2)),
                                  _edit(r / "start", {"rank_pattern": {"q": 2}})), RescueError,
             r"'layers\.0\.q': the rank is 3 in .*adapter, 2 in .*start"),
    "another start": ("anchor", lambda r: _edit(r / "start", {"init_lora_weights": "olora"}),
                      RescueError, r"started from 'pissa', .*start from 'olora'"),
    "NaN": ("anchor", lambda r: _replace(r / "start", A, torch.full((3, 16), torch.nan)),
            NonFiniteError, r"layers\.0\.q\.lora_A"),
    "a shape": ("base", lambda r: _replace(r / "base", f"{Q}.weight", torch.ones(24, 17)),
                ShapeMismatchError, r"'layers\.0\.q'.*\(24, 17\) in .*base.*\(24, 16\)"),
    "integers": ("base", lambda r: _replace(r / "base", f"{Q}.weight",
                                            torch.ones(24, 16, dtype=torch.int8)),
                 RescueError, r"stores 'layers\.0\.q\.weight' as torch\.int8"),
    "base NaN": ("base", lambda r: _replace(r / "base", f"{Q}.weight",
                                            torch.full((24, 16), torch.nan)),
                 NonFiniteError, r"'layers\.0\.q\.weight' in .*base"),
    "no weight": ("residual", lambda r: save_file({"x": torch.ones(1)},
                                                  r / "residual" / "model.safetensors"),
                  UnknownNameError, r"residual: has no tensor 'layers\.0\.p\.weight'"),
    "dora": ("anchor", lambda r: _edit(r / "adapter", {"use_dora": True}),
             HeaderError, r"'layers\.0\.p' has a DoRA magnitude or factors, not both"),
    "bias of lora": ("anchor", lambda r: _edit(r / "adapter", {"lora_bias": True}),
                     UnsupportedAdapterError, "lora_bias=True"),
    "loftq": ("anchor", lambda r: _edit(r / "adapter", {"init_lora_weights": "loftq"}),
              UnsupportedAdapterError, "do not act on the base itself"),
    "no name": ("anchor", lambda r: _edit(r / "adapter", {"init_lora_weights": [1]}),
                UnsupportedAdapterError, r"init_lora_weights is \[1\]"),
    "a dtype": ("anchor", lambda r: _replace(r / "adapter", A,
                                             torch.ones(3, 16, dtype=torch.int32)),
                HeaderError, r"is torch\.int32"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "spoil", "kind", "words"), MISFITS.values(), ids=MISFITS)
def test_files_that_do_not_fit_are_refused(source, spoil, kind, words, tmp_path) -> None:
    made = files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        rescue.load(made.adapter, **made.given(source))
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"residual": "residual"}, "give base"),
        ({"residual": "residual", "anchor": "start", "base": "base"}, "an anchor or a residual"),
        ({"anchor": "adapter"}, "is the trained adapter itself"),
        ({"anchor": "adapter/../adapter/"}, "is the trained adapter itself"),
        ({"residual": "base", "base": "base"}, "both as base and as residual"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_together(given: dict, words: str, tmp_path: Path) -> None:
    made = files(tmp_path)
    with pytest.raises(ConfigError, match=words):
        rescue.load(made.adapter, **{name: f"{tmp_path}/{path}" for name, path in given.items()})


def test_what_needs_no_rescue(tmp_path: Path) -> None:
    made = files(tmp_path)
    value = rescue.load(made.adapter, **made.given("anchor"))
    tether.save(value, tmp_path / "native.safetensors")
    assert same(factors_of(rescue.load(tmp_path / "native.safetensors")), factors_of(value))
    with pytest.raises(ConfigError, match="a native file holds its anchors"):
        rescue.load(tmp_path / "native.safetensors", base=tmp_path / "base")
    tether.save_as_lora(value, tmp_path / "plain")
    assert not rescue.load(tmp_path / "plain").anchored
    with pytest.raises(ConfigError, match="a plain LoRA: leave out base"):
        rescue.load(tmp_path / "plain", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("init", "alone"),
    [("pissa", True), ("olora", True), ("pissa_niter_4", False), ("corda", False)],
)
def test_a_residual_adapter_by_itself_says_what_would_help(
    init: str, alone: bool, tmp_path: Path
) -> None:
    made = files(tmp_path, config={"init_lora_weights": init})
    with pytest.raises(UnsupportedAdapterError) as caught:
        rescue.load(made.adapter)
    words = ["--anchor DIR", "anchor=", "--residual DIR --base DIR", "residual=", "base="]
    assert all(word in str(caught.value) for word in words)
    assert ("or the base model alone (--base DIR; base=)" in str(caught.value)) is alone


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    made = files(tmp_path)
    wanted = rescue.load(made.adapter, **made.given("anchor"))
    torch.save(load_file(made.adapter / WEIGHTS), made.adapter / "adapter_model.bin")
    (made.adapter / WEIGHTS).unlink()
    with pytest.raises(PickleRefusedError, match="Convert it with: python -c") as caught:
        rescue.load(made.adapter, **made.given("anchor"))
    line = shlex.split(re.search("Convert it with: (.*)", str(caught.value))[1])
    subprocess.run([sys.executable, *line[1:]], check=True)
    again = rescue.load(made.adapter, **made.given("anchor"))
    assert same(factors_of(again), factors_of(wanted))


def test_nothing_is_written_into_or_over_what_is_read(tmp_path: Path) -> None:
    made = files(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    (tmp_path / "link").symlink_to(tmp_path / "start")
    for out, words in (
        ("adapter", "is the adapter itself"),
        ("adapter/out.safetensors", "lies in the adapter"),
        ("base/deep/out", "lies in the base model"),
        ("residual", "is the residual model itself"),
        (".", "holds the adapter"),
    ):
        with pytest.raises(ConfigError, match=words):
            rescue.write(made.open("residual"), tmp_path / out)
    with pytest.raises(ConfigError, match="is the anchor itself"):
        rescue.write(made.open("anchor"), tmp_path / "link")
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"tolerance": 1.0}, r"tolerance 1\.0 must be between 0 and 1"),
        ({"rank": 1, "tolerance": 1e-6}, r"site 'layers\.0\.p': rank 1 leaves"),
        ({"dtype": torch.float64}, "dtype torch.float64 is none of"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met(options: dict, words: str, tmp_path: Path) -> None:
    made = files(tmp_path)
    with pytest.raises(ConfigError, match=words):
        rescue.write(made.open("anchor"), tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="always float32"):
        rescue.write(made.open("anchor"), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()
