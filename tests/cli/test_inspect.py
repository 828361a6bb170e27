"""`tether inspect`: the numbers of an adapter are those of its factors and its base."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

import tether
from tether.algebra import delta
from tether.linalg import Certificate

from .conftest import contents, succeed, succeed_json


@pytest.fixture
def adapter(finished):
    return finished[0] / "adapter.safetensors"


def test_a_native_file(adapter, model_folder):
    said = succeed_json("inspect", adapter)
    value, base = tether.load(adapter), load_file(model_folder / "model.safetensors")
    assert (said["form"], said["sites"], said["path"]) == ("anchored", 14, str(adapter))
    assert said["bytes"] == adapter.stat().st_size
    factors = [layer.trainable for layer in value.layers.values()]
    assert said["trained_parameters"] == sum(f.A.numel() + f.B.numel() for f in factors)
    assert said["provenance"] == {
        "method": "pissa",
        "seed": 0,
        "tether_version": tether.__version__,
        "base_model": str(model_folder),
        "learning_rate": 0.01,
        "steps": 12,
        "fingerprints": 14,
        "quantization": "none",
    }
    errors = {s: c.product_error for s, c in value.provenance.certificates.items() if c.unique}
    worst = max(errors, key=errors.get)
    assert said["certificates"] == {
        "anchors": 14,
        "not_unique": 14 - len(errors),
        "worst": errors[worst],
        "worst_site": worst,
    }
    assert said["gap"] is None
    assert (said["config"]["rank"], said["config"]["target_modules"]) == (2, "all-linear")
    assert said["layers"].keys() == value.layers.keys()
    for path, row in said["layers"].items():
        layer, weight = value.layers[path], base[f"{path}.weight"]
        anchor = layer.scaling * layer.anchor.B @ layer.anchor.A
        assert (row["kind"], row["rank"], row["scaling"]) == ("linear", 2, 1.0)
        assert row["shape"] == list(weight.shape)
        norm = float(delta(layer).norm())
        assert row["norm"] == pytest.approx(norm, rel=1e-5)
        assert row["relative"] == pytest.approx(norm / float(weight.norm()), rel=1e-5)
        energy = float(anchor.norm() / weight.norm()) ** 2
        assert row["anchor_energy"] == pytest.approx(energy, rel=1e-5)
        assert 0 < energy < 1


def test_a_folder(finished):
    folder = finished[0] / "lora"
    said = succeed_json("inspect", folder)
    assert (said["form"], said["sites"]) == ("plain LoRA", 14)
    assert said["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    changes = succeed_json("inspect", finished[0] / "adapter.safetensors")["layers"]
    for path, row in said["layers"].items():
        assert row["rank"] == 4
        assert row["norm"] == pytest.approx(changes[path]["norm"], rel=1e-5)
        assert row["relative"] is row["anchor_energy"] is None
    assert said["provenance"]["quantization"] is said["certificates"] is said["gap"] is None


def test_the_table_says_the_same(adapter):
    rows = succeed("inspect", adapter).splitlines()
    for path, values in succeed_json("inspect", adapter)["layers"].items():
        shape = "×".join(map(str, values["shape"]))
        numbers = [f"{values['norm']:.4g}", f"{values['relative']:.3%}"]
        words = [path, shape, *numbers, f"{values['anchor_energy']:.1%}"]
        assert any(all(word in row for word in words) for row in rows)
    assert any("learning rate" in row and "0.01" in row for row in rows)


def test_a_folder_without_origin_says_so(finished):
    said = succeed("inspect", finished[0] / "lora")
    assert "plain LoRA" in said
    assert "–" in said


def test_patterns_are_shown_as_they_are(tiny_llama, tmp_path):
    config = tether.LoraConfig(rank=2, rank_pattern={"*.[qk]_proj": 1})
    path = tmp_path / "a.safetensors"
    tether.save(tether.init(tiny_llama(), config), path)
    assert "*.[qk]_proj" in succeed("inspect", path)


def test_an_untrained_adapter_changes_nothing(tiny_llama, tmp_path):
    path = tmp_path / "a.safetensors"
    tether.save(tether.init(tiny_llama(), tether.LoraConfig(init="gaussian", rank=2)), path)
    before = contents(tmp_path)
    rows = succeed_json("inspect", path)["layers"].values()
    assert {(row["norm"], row["relative"], row["anchor_energy"]) for row in rows} == {(0, 0, None)}
    assert contents(tmp_path) == before


def test_the_error_of_every_anchor_is_shown_and_what_is_not_known_is_not(tiny_llama, tmp_path):
    path = tmp_path / "a.safetensors"
    whole = tether.init(tiny_llama(), tether.LoraConfig(rank=2))
    first, second, third, *_ = whole.layers
    certificates = {
        first: Certificate("lanczos", 3.25e-6, 1e-13, unique=True),
        second: Certificate("dense", 6e-8, 0.0, unique=False, fallback="gram: 2e-3 after 96"),
    }
    tether.save(
        replace(whole, provenance=replace(whole.provenance, certificates=certificates)), path
    )
    layers = succeed_json("inspect", path)["layers"]
    assert layers[first]["certificate"]["product_error"] == 3.25e-6
    assert layers[third]["certificate"] is None
    lines = succeed("inspect", path).splitlines()
    cells = {
        line.split("│")[1].strip(): line.split("│")[-2].strip() for line in lines if "│" in line
    }
    assert [cells[site] for site in (first, second, third)] == ["3.2e-06", "not unique", "–"]
    assert f"{second}: its anchor was found the slow way: gram: 2e-3 after 96" in lines


def about(text):
    """The rows of the first table: name -> value."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.count("│") == 3]
    return {row[0].strip(): row[1].strip() for row in rows}


def test_of_a_quantised_base_it_says_which_and_how_far_from_the_original(tiny_llama, tmp_path):
    path = tmp_path / "a.safetensors"
    value = tether.init(tiny_llama(), tether.LoraConfig(rank=2))
    first, second, third, *_ = value.layers
    prints = {
        site: replace(found, dtype="bitsandbytes nf4" if site != second else "float32")
        for site, found in value.provenance.fingerprints.items()
    }
    certificates = {
        first: Certificate("lanczos", 3.25e-6, 1e-13, unique=True),
        second: Certificate("dense", 0.7, 0.0, unique=False),
        third: Certificate("dense", 2e-7, 0.0, unique=True),
    }
    tether.save(
        value.with_provenance(
            fingerprints=prints, certificates=certificates, gaps={first: 0.0912, second: 0.1}
        ),
        path,
    )
    said = succeed_json("inspect", path)
    assert said["provenance"]["quantization"] == "bitsandbytes nf4"
    assert said["gap"] == {"sites": 2, "smallest": 0.0912, "largest": 0.1}
    assert said["certificates"] == {
        "anchors": 3,
        "not_unique": 1,
        "worst": 3.25e-6,
        "worst_site": first,
    }
    rows = about(succeed("inspect", path))
    assert rows["quantization"] == "bitsandbytes nf4"
    assert rows["anchor error"] == "3.2e-06 at worst (estimated); 1 of 3 not unique"
    assert rows["from the original weights"] == "0.0912 to 0.1 of |W|"


def test_what_was_not_recorded_is_not_shown(finished):
    rows = about(succeed("inspect", finished[0] / "lora"))
    assert rows["quantization"] == "unknown"
    assert "anchor error" not in rows
    assert "from the original weights" not in rows


def test_no_text_of_a_file_steers_the_terminal(tiny_llama, tmp_path):
    path = tmp_path / "a.safetensors"
    value = tether.init(tiny_llama(), tether.LoraConfig(rank=2))
    escape = "\x1b[2Jevil\n"
    site = next(iter(value.layers))
    layers = {escape if name == site else name: layer for name, layer in value.layers.items()}
    certificate = Certificate("dense", 1e-6, 0.0, unique=True, fallback="slow")
    value = replace(value, layers=layers, config={"note": escape})
    value = value.with_provenance(
        base_model=escape, fingerprints={}, certificates={escape: certificate}
    )
    tether.save(value, path)
    said = succeed("inspect", path)
    assert "\x1b" not in said
    rows = about(said)
    assert rows["base model"] == rows["config: note"] == r"\x1b[2Jevil\n"
    assert r"\x1b[2Jevil\n: its anchor was found the slow way: slow" in said
    assert succeed_json("inspect", path)["provenance"]["base_model"] == escape
