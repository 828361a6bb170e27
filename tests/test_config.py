import copy
import dataclasses
import json
import math
import pickle

import pytest
from torch import nn

import tether
from tether import LoraConfig, methods
from tether.config import plan
from tether.errors import ConfigError, RankTooLargeError, UnknownMethodError, UnknownNameError
from tether.methods.orthogonal import Orthogonal
from tether.methods.pissa import PiSSA


def model() -> nn.Module:
    block = {"q": nn.Linear(16, 16), "up": nn.Linear(16, 8)}
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(block), nn.Linear(16, 12)])})


def planned(**settings: object) -> dict[str, tuple[int, float]]:
    config = LoraConfig(**({"rank": 4} | settings))
    return {item.site.path: (item.rank, item.scaling) for item in plan(model(), config)}


def test_the_defaults_are_pissa_of_rank_16_with_scaling_1_on_all_linear():
    config = LoraConfig()
    assert (config.init, config.rank, config.alpha) == ("pissa", 16, None)
    assert config.target_modules == "all-linear"
    assert (config.use_rslora, config.dropout, config.seed) == (False, 0.0, 0)
    assert config.method == PiSSA()


@pytest.mark.parametrize(
    ("settings", "q", "up", "last"),
    [
        ({}, (4, 1.0), (4, 1.0), (4, 1.0)),
        ({"alpha": 8}, (4, 2.0), (4, 2.0), (4, 2.0)),
        ({"alpha": 8, "use_rslora": True}, (4, 4.0), (4, 4.0), (4, 4.0)),
        ({"use_rslora": True}, (4, 2.0), (4, 2.0), (4, 2.0)),
        ({"rank_pattern": {"q": 9}}, (9, 1.0), (4, 1.0), (4, 1.0)),
        ({"rank_pattern": {"q": 9}, "alpha": 9}, (9, 1.0), (4, 2.25), (4, 2.25)),
        (
            {"rank_pattern": {"q": 9}, "alpha_pattern": {"up": 6}, "alpha": 3, "use_rslora": True},
            (9, 1.0),
            (4, 3.0),
            (4, 1.5),
        ),
        (
            {"rank_pattern": {"q": 9}, "alpha_pattern": {"q": 6}, "use_rslora": True},
            (9, 2.0),
            (4, 2.0),
            (4, 2.0),
        ),
        ({"rank_pattern": {"*.up": 2, "layers.0.*": 8}}, (8, 1.0), (2, 1.0), (4, 1.0)),
        ({"rank_pattern": {"layers.0.*": 8, "*.up": 2}}, (8, 1.0), (8, 1.0), (4, 1.0)),
        ({"alpha_pattern": {"layers.1": 2, "layers.*": 8}}, (4, 2.0), (4, 2.0), (4, 0.5)),
    ],
)
def test_rank_and_scaling_of_each_site(settings, q, up, last):
    assert planned(**settings) == {"layers.0.q": q, "layers.0.up": up, "layers.1": last}


def test_rslora_with_patterns_reaches_the_layers():
    config = LoraConfig(
        rank=4, alpha=5, use_rslora=True, rank_pattern={"q": 9}, alpha_pattern={"q": 7.5}
    )
    layers = tether.init(model(), config).layers
    assert (layers["layers.0.q"].rank, layers["layers.0.q"].scaling) == (9, 7.5 / 3)
    assert layers["layers.1"].scaling == 5 / math.sqrt(4)


@pytest.mark.parametrize("layers", [1, [1], (1,)])
def test_one_layer_or_several_can_be_named(layers):
    assert list(planned(layers_to_transform=layers)) == ["layers.1"]


def test_the_selection_reaches_the_sites():
    assert list(planned(target_modules=["q", "up"], exclude_modules=["*.up"])) == ["layers.0.q"]
    assert LoraConfig(exclude_modules="up").exclude_modules == ("up",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": 3}, "init must be a method or its name, not 3"),
        ({"init": PiSSA}, "init must be a method or its name, not <class"),
        ({"init": None}, "init must be a method or its name, not None"),
        ({"rank": 0}, "rank must be a whole number, at least 1, not 0"),
        ({"rank": -4}, "rank must be .* not -4"),
        ({"rank": 4.0}, "rank must be .* not 4.0"),
        ({"rank": True}, "rank must be .* not True"),
        ({"rank": "8"}, "rank must be .* not '8'"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": "16"}, "alpha must be a positive number, not '16'"),
        ({"alpha": True}, "alpha must be a positive number, not True"),
        ({"use_rslora": 1}, "use_rslora must be True or False, not 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), not -0.1"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\), not nan"),
        ({"dropout": None}, r"dropout must be in \[0, 1\), not None"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["a", 3]}, "target_modules must hold names, not 3"),
        ({"target_modules": ["a", ""]}, "target_modules must hold names, not ''"),
        ({"target_modules": None}, "target_modules must"),
        ({"target_modules": 3}, "target_modules must"),
        ({"exclude_modules": [3]}, "exclude_modules must hold names, not 3"),
        ({"exclude_modules": None}, "exclude_modules must"),
        ({"layers_to_transform": []}, "layers_to_transform is empty; use None for all"),
        ({"layers_to_transform": -1}, "layers_to_transform must be .* at least 0, not -1"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform must be .* not '1'"),
        ({"layers_to_transform": True}, "layers_to_transform must be .* not True"),
        ({"layers_to_transform": 1.5}, "layers_to_transform must"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be .* not 0"),
        ({"rank_pattern": {"q": 2.5}}, r"rank_pattern\['q'\] must be .* not 2.5"),
        ({"rank_pattern": ["q"]}, "rank_pattern must"),
        ({"rank_pattern": None}, "rank_pattern must"),
        ({"rank_pattern": {3: 4}}, "rank_pattern must"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] must be a positive number, not 0"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] must be .* not None"),
        ({"seed": -1}, "seed must be a whole number, at least 0 and at most .* not -1"),
        ({"seed": 2**63}, f"seed must be .* not {2**63}"),
        ({"seed": 0.5}, "seed must be .* not 0.5"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_when_made(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoraConfig(**settings)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_site_is_refused(field):
    with pytest.raises(UnknownNameError, match=f"{field}: 'uo' matches none of the 3 sites.*'up'"):
        planned(**{field: {"q": 3, "uo": 3}})
    with pytest.raises(UnknownNameError, match=f"{field}: 'up' matches none of the 1 sites"):
        planned(**{field: {"up": 3}}, target_modules="q")


def test_a_rank_above_a_sites_smaller_side_is_refused_with_the_pattern_that_helps():
    with pytest.raises(RankTooLargeError) as caught:
        planned(rank=9)
    message = str(caught.value)
    assert message.startswith("site 'layers.0.up': rank 9 exceeds min(shape) 8 of weight (8, 16)")
    assert "rank_pattern={'*.up': 8}" in message
    assert planned(rank=9, rank_pattern={"*.up": 8})["layers.0.up"] == (8, 1.0)
    with pytest.raises(RankTooLargeError, match=r"site 'layers.0.up': rank 10 exceeds"):
        planned(rank_pattern={"up": 10})


FULL = LoraConfig(
    init=Orthogonal(std=0.5),
    rank=3,
    alpha=2.5,
    use_rslora=True,
    dropout=0.25,
    target_modules=["q", "*.up"],
    exclude_modules="layers.1",
    layers_to_transform=0,
    rank_pattern={"q": 2},
    alpha_pattern={"*.up": 1.5},
    seed=11,
)


@pytest.mark.parametrize("config", [LoraConfig(), FULL], ids=["default", "full"])
def test_a_configuration_survives_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    again = LoraConfig.from_dict(values)
    assert again == (config if config is FULL else dataclasses.replace(config, init=PiSSA()))
    assert again.to_dict() == values
    assert set(values) == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))]
)
@pytest.mark.parametrize("config", [LoraConfig(), FULL], ids=["default", "full"])
def test_a_configuration_copies_and_pickles(config, copied):
    assert copied(config) == config


def test_from_dict_takes_missing_fields_as_defaults_and_refuses_unknown_ones():
    assert LoraConfig.from_dict({"rank": 2}) == LoraConfig(rank=2)
    assert LoraConfig.from_dict({"init": "olora"}).init == "olora"
    with pytest.raises(UnknownNameError, match=r"no field 'lora_alpha'.*'alpha'"):
        LoraConfig.from_dict({"lora_alpha": 16})
    with pytest.raises(UnknownMethodError, match=r"'pisa' is not a method.*'pissa'"):
        LoraConfig.from_dict({"init": {"name": "pisa"}})
    with pytest.raises(UnknownNameError, match="'pissa' has no setting 'tol'"):
        LoraConfig.from_dict({"init": {"name": "pissa", "tol": 1}})
    with pytest.raises(ConfigError, match="rank must"):
        LoraConfig.from_dict({"rank": "2"})


def test_a_configuration_is_frozen_down_to_its_patterns():
    patterns = {"q": 2}
    config = LoraConfig(rank_pattern=patterns)
    patterns["q"] = 3
    assert config.rank_pattern == {"q": 2}
    with pytest.raises(TypeError):
        config.rank_pattern["q"] = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


@pytest.mark.parametrize("name", methods.names())
def test_a_name_and_its_object_mean_the_same(name):
    by_name = tether.init(model(), LoraConfig(init=name, rank=2, seed=4))
    by_object = tether.init(model(), LoraConfig(init=methods.get(name), rank=2, seed=4))
    assert by_name.config == by_object.config
    assert by_name.provenance.method == by_object.provenance.method == name
