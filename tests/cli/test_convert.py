"""`tether convert`: a plain LoRA of any rank and dtype, its error as measured."""

import pytest
import torch

import tether
from tether.algebra import delta
from training.files import tensors

from .conftest import contents, invoke, succeed, succeed_json


@pytest.fixture
def adapter(finished):
    return finished[0] / "adapter.safetensors"


def measured(adapter: tether.Adapter, written: tether.Adapter) -> dict[str, float]:
    """|ΔW − ΔW'| / |ΔW| of every site, from the changes themselves."""
    return {
        path: float((delta(layer) - delta(written.layers[path])).norm() / delta(layer).norm())
        for path, layer in adapter.layers.items()
    }


@pytest.mark.parametrize(
    ("options", "ranks", "largest"),
    [
        ([], {4}, 1e-6),
        (["--rank", "2"], {2}, 1.0),
        (["--tolerance", "0.2"], {1, 2, 3, 4}, 0.2),
        (["--dtype", "bfloat16"], {4}, 4e-3),
        (["--dtype", "float16", "--rank", "3"], {3}, 1.0),
    ],
)
def test_the_error_reported_is_the_error_of_the_file(options, ranks, largest, adapter, tmp_path):
    before = contents(adapter.parent)
    said = succeed_json("convert", adapter, tmp_path / "plain", *options)
    source, written = tether.load(adapter), tether.load(tmp_path / "plain")
    errors = measured(source, written)
    assert not written.anchored
    assert said["written"] == said["path"] == str(tmp_path / "plain")
    assert said["sites"].keys() == errors.keys()
    for path, site in said["sites"].items():
        assert site["error"] == pytest.approx(errors[path], rel=1e-2, abs=1e-6)
        assert site["norm"] == pytest.approx(float(delta(source.layers[path]).norm()), rel=1e-5)
        assert site["rank"] in ranks
        assert site["error"] <= largest
    assert said["rank"] == max(site["rank"] for site in said["sites"].values())
    assert 0 <= said["error"] <= max(errors.values()) + 1e-6
    dtype = options[options.index("--dtype") + 1] if "--dtype" in options else "float32"
    assert said["dtype"] == dtype
    kinds = {
        value[0]
        for value in tensors(tmp_path / "plain/adapter_model.safetensors").values()
        if isinstance(value, tuple)
    }
    assert kinds == {getattr(torch, dtype)}
    assert contents(adapter.parent) == before


def test_a_smaller_rank_costs_more(adapter, tmp_path):
    errors = [
        succeed_json("convert", adapter, tmp_path / str(rank), "--rank", rank)["error"]
        for rank in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01 > 1e-6 > errors[3]


def test_a_native_file_is_a_copy_or_of_the_rank_asked_for(finished, adapter, tmp_path):
    said = succeed_json("convert", adapter, tmp_path / "copy.safetensors")
    assert said == {"written": str(tmp_path / "copy.safetensors"), "format": "native"}
    assert tensors(tmp_path / "copy.safetensors") == tensors(adapter)
    succeed_json("convert", adapter, tmp_path / "small.safetensors", "--rank", "1")
    small = tether.load(tmp_path / "small.safetensors")
    assert not small.anchored
    assert {layer.rank for layer in small.layers.values()} == {1}
    # Back from the folder: the same change.
    succeed_json("convert", finished[0] / "lora", tmp_path / "back.safetensors")
    errors = measured(tether.load(adapter), tether.load(tmp_path / "back.safetensors"))
    assert max(errors.values()) < 1e-6


def test_the_table_names_every_site(adapter, tmp_path):
    out = tmp_path / "plain[b]"  # no markup
    said = succeed("convert", adapter, out, "--rank", "3")
    for path in tether.load(adapter).layers:
        assert any(path in row and " 3 " in row for row in said.splitlines())
    assert "rank 3, float32, relative error of all" in said
    assert f"wrote{out}" in "".join(said.split())
    native = tmp_path / "copy[b].safetensors"
    assert "".join(succeed("convert", adapter, native).split()) == f"wrote{native}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{out}/a", "--rank", "0"], "rank 0 must be at least 1"),
        (["{out}/a", "--tolerance", "nan"], "tolerance nan must be between 0 and 1"),
        (["{out}/a", "--rank", "1", "--tolerance", "1e-9"], "above tolerance 1e-09. Raise one"),
        (["{out}/a", "--dtype", "float23"], "'float23' is not one. Nearest: 'float32'"),
        (["{out}/a.safetensors", "--dtype", "bfloat16"], "always float32; leave out --dtype"),
        (["{adapter}"], "is the adapter itself; choose another OUT"),
        (["{out}"], "holds 'mine.txt'"),
        (["{out}/mine.txt"], "is a file; give the name of a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(options, words, adapter, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    before = contents(tmp_path), contents(adapter.parent)
    filled = [option.format(out=tmp_path, adapter=adapter) for option in options]
    result = invoke("convert", adapter, *filled)
    assert result.exit_code == 2
    assert words in result.stderr
    assert (contents(tmp_path), contents(adapter.parent)) == before
