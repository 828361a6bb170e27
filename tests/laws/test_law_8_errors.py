"""Law 8: what cannot be right is refused by a named error that says where, what and what to do."""

import dataclasses

import pytest
import torch

import tether
from laws.cases import Case, law, state_of
from tether import errors

PLAIN = Case("pissa", torch.float32, "tall", 0, 2, 1.0, False, 0.0, 1e-2)


@law(examples=1)
def test_a_rank_above_the_smaller_side_is_refused(case):
    model = case.model()
    before, shape = state_of(model), tuple(model.linear.weight.shape)
    smaller = min(shape)
    with pytest.raises(errors.RankTooLargeError) as caught:
        tether.attach(model, case.config(rank=smaller + 1, target_modules=["linear"]))
    assert str(caught.value) == (
        f"site 'linear': rank {smaller + 1} exceeds min(shape) {smaller} of weight {shape}. "
        f"Use rank <= {smaller}, or rank_pattern={{'linear': {smaller}}}."
    )
    assert state_of(model) == before
    assert tether.init(model, case.config(rank=smaller)).layers["linear"].rank == smaller


@law(examples=1)
def test_a_weight_that_is_not_finite_is_refused(case):
    model = case.model()
    row, column = (n - 1 for n in model.linear.weight.shape)
    for value in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            model.linear.weight[row, column] = value
        before = state_of(model)
        with pytest.raises(errors.NonFiniteError) as caught:
            tether.attach(model, case.config())
        for part in ("site 'linear'", f"1 of {model.linear.weight.numel()}", str(float(value))):
            assert part in str(caught.value)
        assert f"at ({row}, {column})" in str(caught.value)
        assert "Repair or reload" in str(caught.value)
        assert state_of(model) == before


def test_a_weight_without_values_is_refused():
    model = PLAIN.model().to("meta")
    for action in (tether.init, tether.attach):
        with pytest.raises(errors.MetaTensorError, match=r"site 'linear'.*meta device.*Load the"):
            action(model, PLAIN.config())


def test_factors_that_their_dtype_cannot_hold_are_refused():
    model = PLAIN.model()
    with torch.no_grad():
        model.linear.weight.mul_(1e12)
    before = state_of(model)
    adapter = tether.init(model, PLAIN.config(target_modules=["linear"]))
    assert adapter.layers["linear"].anchor.A.abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(errors.NonFiniteError, match=r"site 'linear'.*float16"):
        tether.attach(model, adapter, dtype=torch.float16)
    assert state_of(model) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_not_written(value, tmp_path):
    adapter = tether.init(PLAIN.model(), PLAIN.config())
    adapter.layers["linear"].trainable.B[1, 0] = value
    file, folder = tmp_path / "a.safetensors", tmp_path / "plain"
    with pytest.raises(errors.NonFiniteError, match=r"site 'linear': factor dB.*at \(1, 0\)"):
        tether.save(adapter, file)
    with pytest.raises(errors.NonFiniteError, match="site 'linear'"):
        tether.save_as_lora(adapter, folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_not_positive_is_refused(alpha):
    for settings, where in (
        ({"alpha": alpha}, "alpha must"),
        ({"alpha_pattern": {"linear": alpha}}, r"alpha_pattern\['linear'\] must"),
    ):
        with pytest.raises(errors.ConfigError, match=f"{where} be a positive number, not {alpha}"):
            tether.LoraConfig(**settings)


def elsewhere(adapter: tether.Adapter) -> tether.Adapter:
    return dataclasses.replace(adapter, layers={"liner": adapter.layers["linear"]})


@pytest.mark.parametrize(
    ("action", "error", "parts"),
    [
        (
            lambda model, adapter: PLAIN.config(init="pisa"),
            errors.UnknownMethodError,
            ("init", "'pisa'", "'pissa'"),
        ),
        (
            lambda model, adapter: PLAIN.config(init="no such thing"),
            errors.UnknownMethodError,
            ("Valid:", "'gaussian'", "'pissa'"),
        ),
        (
            lambda model, adapter: tether.LoraConfig.from_dict({"rnak": 4}),
            errors.UnknownNameError,
            ("LoraConfig", "'rnak'", "'rank'"),
        ),
        (
            lambda model, adapter: tether.only(model, "fist").__enter__(),
            errors.UnknownNameError,
            ("'fist'", "'first'"),
        ),
        (
            lambda model, adapter: tether.attach(model, elsewhere(adapter), "second"),
            errors.UnknownNameError,
            ("'liner'", "'linear'"),
        ),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(action, error, parts):
    model = PLAIN.model()
    adapter = tether.attach(model, PLAIN.config(), name="first").snapshot()
    with pytest.raises(error) as caught:
        action(model, adapter)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("error", [e for n, e in vars(errors).items() if n.endswith("Error")])
def test_every_error_is_one_of_tethers(error):
    assert issubclass(error, errors.TetherError)
    assert error.__doc__
    assert error.__name__ in errors.__doc__
