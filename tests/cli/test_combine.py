"""`tether combine`: adapters of one base as one, the error as measured, inputs only read."""

import json

import pytest
import torch

import tether
from tether import combine
from tether.algebra import delta, relative_error
from training.files import tensors

from .conftest import contents, invoke, succeed, succeed_json


@pytest.fixture(scope="module")
def adapters(finished, tmp_path_factory):
    """The trained adapter as a native file, and another of the same base as a plain folder."""
    folder = tmp_path_factory.mktemp("adapters")
    one = tether.load(finished[0] / "adapter.safetensors")
    tether.save(one, folder / "one.safetensors")
    turned = combine.svd([one], [-2.0], rank=1).adapter
    tether.save_as_lora(turned, folder / "two")
    return folder / "one.safetensors", folder / "two"


def values(adapters):
    return [tether.load(path) for path in adapters]


CALLS = {
    "linear": ([], combine.linear, {}),
    "cat": (["--method", "cat"], combine.cat, {}),
    "svd": (["--method", "svd", "--rank", "2"], combine.svd, {"rank": 2}),
    "svd, tolerance": (
        ["--method", "svd", "--tolerance", "0.3"],
        combine.svd,
        {"tolerance": 0.3},
    ),
    "ties": (
        ["--method", "ties", "--rank", "3", "--density", "0.4"],
        combine.ties,
        {"rank": 3, "density": 0.4},
    ),
    "ties, frequency": (
        ["--method", "ties", "--rank", "3", "--density", "0.4", "--majority", "frequency"],
        combine.ties,
        {"rank": 3, "density": 0.4, "majority": "frequency"},
    ),
    "dare": (
        ["--method", "dare", "--rank", "3", "--density", "0.5", "--seed", "7"],
        combine.dare,
        {"rank": 3, "density": 0.5, "seed": 7},
    ),
    "dare, ties": (
        ["--method", "dare", "--rank", "3", "--density", "0.5", "--then", "ties"],
        combine.dare,
        {"rank": 3, "density": 0.5, "then": "ties"},
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_writes_what_the_library_gives_and_says_its_error(call, adapters, tmp_path):
    options, method, settings = CALLS[call]
    before = contents(adapters[0].parent)
    weights = ["--weight", "0.7", "--weight", "-0.3"]
    wanted = method(values(adapters), [0.7, -0.3], **settings)
    for out in (tmp_path / "lora", tmp_path / "native.safetensors"):
        said = succeed_json("combine", *adapters, "--out", out, *weights, *options)
        written = tether.load(out)
        assert not written.anchored
        assert said["written"] == str(out)
        assert said["format"] == ("native" if out.suffix else "lora")
        assert (said["method"], said["weights"]) == (method.__name__, [0.7, -0.3])
        assert said["sites"].keys() == written.layers.keys() == wanted.sites.keys()
        for path, site in said["sites"].items():
            here = wanted.sites[path]
            assert site == {"rank": here.rank, "norm": here.norm, "error": here.error}
            found = relative_error(wanted.adapter.layers[path], written.layers[path])
            assert found < 1e-6
        assert said["rank"] == max(site["rank"] for site in said["sites"].values())
        assert said["error"] == wanted.error
        assert said["rounding"] < 1e-6
    assert tether.load(tmp_path / "native.safetensors").config == wanted.adapter.config
    assert contents(adapters[0].parent) == before


def test_without_weights_it_is_the_sum(adapters, tmp_path):
    succeed_json("combine", *adapters, "--out", tmp_path / "sum")
    one, two = values(adapters)
    for path, layer in tether.load(tmp_path / "sum").layers.items():
        wanted = delta(one.layers[path]) + delta(two.layers[path])
        assert float((delta(layer) - wanted).norm() / wanted.norm()) < 1e-5


def test_a_half_precision_says_what_rounding_costs(adapters, tmp_path):
    said = succeed_json("combine", *adapters, "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert said["dtype"] == "bfloat16"
    assert said["error"] < 1e-6
    assert 1e-4 < said["rounding"] < 1e-2
    kinds = {
        value[0]
        for value in tensors(tmp_path / "half/adapter_model.safetensors").values()
        if isinstance(value, tuple)
    }
    assert kinds == {torch.bfloat16}


def test_the_table_names_every_site(adapters, tmp_path):
    out = tmp_path / "sum[b]"  # no markup
    options = ["--method", "svd", "--rank", "3", "--weight", "0.5", "--weight", "2"]
    said = succeed("combine", *adapters, "--out", out, *options)
    for path in tether.load(adapters[0]).layers:
        assert any(path in row and " 3 " in row for row in said.splitlines())
    assert "svd of weights 0.5, 2: rank 3, float32" in said
    assert "relative error of all" in said
    assert f"wrote{out}" in "".join(said.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "{out}/a", "--method", "tie"], "method 'tie' is not one. Nearest: 'ties'"),
        (["--out", "{out}/a", "--rank", "2"], "--rank says nothing to linear; leave it out, or"),
        (["--out", "{out}/a", "--seed", "2"], "or use --method dare."),
        (["--out", "{out}/a", "--method", "svd"], "svd needs a rank or a tolerance"),
        (["--out", "{out}/a", "--method", "ties", "--rank", "2"], "ties needs --density"),
        (["--out", "{out}/a", "--method", "dare", "--density", "0.5"], "dare needs --rank"),
        (["--out", "{out}/a", "--weight", "1"], "1 weights for 2 adapters"),
        (["--out", "{out}/a", "--weight", "1", "--weight", "nan"], "weight nan is not a finite"),
        (["--out", "{out}/a", "--dtype", "float23"], "'float23' is not one. Nearest: 'float32'"),
        (["--out", "{out}/a.safetensors", "--dtype", "float16"], "always float32; leave out"),
        (["--out", "{one}"], "itself, or one lies in the other; choose another OUT"),
        (["--out", "{two}"], "itself, or one lies in the other"),
        (["--out", "{two}/a.safetensors"], "itself, or one lies in the other"),
        (["--out", "{parent}"], "itself, or one lies in the other"),
        (["--out", "{out}"], "holds 'mine.txt'"),
        (["{out}/none", "--out", "{out}/a"], "none: no such file or folder"),
        ([], "Missing option '--out'"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(options, words, adapters, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    before = contents(tmp_path), contents(adapters[0].parent)
    places = {"out": tmp_path, "one": adapters[0], "two": adapters[1]}
    places["parent"] = adapters[0].parent
    result = invoke("combine", *adapters, *(option.format(**places) for option in options))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert (contents(tmp_path), contents(adapters[0].parent)) == before


def test_adapters_of_another_base_are_refused_by_site(adapters, tmp_path):
    one = tether.load(adapters[0])
    prints = {
        path: tether.Fingerprint(p.shape, p.dtype, *("0" * 64,) * 3, p.norm)
        for path, p in one.provenance.fingerprints.items()
    }
    other = one.with_provenance(fingerprints=prints)
    tether.save(other, tmp_path / "other.safetensors")
    paths = (adapters[0], tmp_path / "other.safetensors")
    result = invoke("combine", *paths, "--out", tmp_path / "a", "--json")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"] == "BaseMismatchError"
    assert next(iter(one.layers)) in said["message"]
    assert not (tmp_path / "a").exists()
