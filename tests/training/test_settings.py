"""Settings are checked when made, and survive run.json."""

import json
import math

import pytest
import torch

import tether
from tether.errors import ConfigError, UnknownNameError
from tether.methods.pissa import PiSSA
from tether.training.settings import Settings


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "batch_size": [0, -1],
        "accumulation": [0],
        "eval_limit": [0],
        "block": [1],
        "steps": [0, -5],
        "epochs": [0.0, math.inf, math.nan],
        "learning_rate": [0.0, -1e-4, math.nan, math.inf],
        "weight_decay": [-0.1, math.inf],
        "clip": [-1.0, math.nan],
        "eval_every": [-1],
        "save_every": [-1],
        "seed": [-1],
        "warmup": [1.0, -0.1, math.nan],
        "held_out": [0.0, 1.0, math.nan],
        "dtype": ["float16", "float64"],
    }.items(),
)
def test_a_value_that_cannot_be_meant_is_named(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name} must be .*, not {value!r}"):
            Settings(**{name: value})


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"steps": 7}, 7),
        ({}, 5),  # 20 sequences, 4 a step
        ({"batch_size": 3}, 7),
        ({"batch_size": 3, "accumulation": 2, "epochs": 2.5}, 9),
        ({"epochs": 0.001}, 1),
    ],
)
def test_steps_follow_from_the_epochs_unless_they_are_given(settings, total):
    assert Settings(**settings).total_steps(20) == total


def test_settings_survive_json():
    lora = tether.LoraConfig(
        init=PiSSA(tolerance=1e-4),
        rank=3,
        alpha=5.0,
        use_rslora=True,
        dropout=0.25,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["*.0.*"],
        layers_to_transform=[0, 1],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 9.0},
        seed=4,
    )
    settings = Settings(model="a", data="b", lora=lora, steps=3, dtype="bfloat16", seed=4)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert Settings.from_dict({}) == Settings()


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'learning_rat'.*Nearest: 'learning_rate'"):
        Settings.from_dict({"learning_rat": 1e-3})


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_torch_cannot_use_is_named(device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: ."):
        Settings(device=device).torch_device()


def test_the_device_is_found(monkeypatch):
    assert Settings(device="cpu").torch_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Settings().torch_device() == torch.device("cpu")
