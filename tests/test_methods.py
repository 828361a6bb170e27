import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import tether
from tether import errors, methods
from tether.methods import Context, base
from tether.value import Factors

SCALING = 0.7
LIFTING = tuple(name for name in methods.names() if methods.get(name).lifts)


def start(name: str, weight: Tensor, rank: int, **settings: float) -> Factors:
    context = Context("site", SCALING, torch.Generator().manual_seed(0))
    return methods.get(name, settings).start(weight, rank, context)


def double(factors: Factors) -> tuple[Tensor, Tensor]:
    return factors.A.double(), factors.B.double()


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("shape", [(24, 7), (7, 24), (5, 5), (1, 9), (9, 1)])
def test_every_start_has_the_shape_asked_for_and_lifts_or_is_zero(name, shape):
    weight = torch.randn(shape)
    version = weight._version
    for rank in range(1, min(shape) + 1):
        factors = start(name, weight, rank)
        assert factors.A.shape == (rank, shape[1])
        assert factors.B.shape == (shape[0], rank)
        for factor in (factors.A, factors.B):
            assert factor.dtype == torch.float32
            assert factor.is_contiguous()
        assert bool((factors.B @ factors.A).any()) is methods.get(name).lifts
    assert weight._version == version


@pytest.mark.parametrize(("name", "part"), [("pissa", slice(0, 3)), ("milora", slice(3, 6))])
def test_pissa_and_milora_lift_the_ends_of_the_spectrum(name, part):
    weight = torch.randn(8, 6)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    a, b = double(start(name, weight, 3))
    lifted = u[:, part] * s[part] @ vt[part]
    torch.testing.assert_close(SCALING * b @ a, lifted, rtol=1e-5, atol=1e-6)
    # Each pair shares its singular value evenly.
    root = (s[part] / SCALING).sqrt()
    torch.testing.assert_close(a.norm(dim=1), root, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.norm(dim=0), root, rtol=1e-5, atol=1e-6)


def test_olora_lifts_the_leading_columns_of_q_and_rows_of_r():
    weight = torch.randn(8, 6)
    q, r = torch.linalg.qr(weight.double())
    a, b = double(start("olora", weight, 3))
    torch.testing.assert_close(b, q[:, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a, r[:3], rtol=1e-5, atol=1e-6)


def test_lora_is_uniform_up_to_one_over_the_root_of_in():
    a, b = double(start("lora", torch.empty(4, 400), 4))
    limit = 1 / math.sqrt(400)
    assert float(a.abs().max()) == pytest.approx(limit, rel=0.01)
    assert float(a.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert float(a.mean()) == pytest.approx(0, abs=limit / 20)
    assert not b.any()


def test_gaussian_has_standard_deviation_one_over_rank():
    a, b = double(start("gaussian", torch.empty(8, 500), 8))
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.05)
    assert float((a.abs() > 2 / 8).double().mean()) == pytest.approx(0.0455, abs=0.015)
    assert not b.any()


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("std", [0.1, 2.0])
def test_orthogonal_factors_act_in_separate_halves_of_the_rank(rank, std):
    a, b = double(start("orthogonal", torch.empty(300, 400), rank, std=std))
    half = (rank + 1) // 2
    assert not a[half:].any()
    assert not b[:, :half].any()
    assert not (b @ a).any()
    for values in (a[:half], b[:, half:]):
        if values.numel():
            assert float(values.std()) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_any_dtype_gives_the_start_of_its_float32_values(name, dtype):
    """As the class says; 300 is beyond what is decomposed densely."""
    assert methods.get(name).any_dtype
    weight = torch.randn(320, 300).to(dtype)
    found, expected = start(name, weight, 4), start(name, weight.float(), 4)
    for one, other in ((found.A, expected.A), (found.B, expected.B)):
        assert one.dtype == torch.float32
        if dtype == torch.float64:
            # Where float64 is decomposed as it is, the rest is the rounding of float32.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", methods.names())
def test_a_deterministic_method_draws_nothing_and_the_others_do(name):
    weight, starts, moved = torch.randn(320, 300), [], []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        before = generator.get_state()
        starts.append(methods.get(name).start(weight, 4, Context(f"site {seed}", 1.0, generator)))
        moved.append(not torch.equal(before, generator.get_state()))
    says = getattr(methods.get(name), "deterministic", False)
    assert says == (name in LIFTING)
    assert moved == [not says] * 2
    assert torch.equal(starts[0].A, starts[1].A) is says


@pytest.mark.parametrize("name", methods.names())
def test_the_certificate_of_the_decomposition_is_recorded_by_pissa(name):
    recorded = []
    context = Context("site", SCALING, torch.Generator().manual_seed(0), recorded.append)
    methods.get(name).start(torch.randn(24, 16), 3, context)
    assert [c.route for c in recorded] == (["dense"] if name == "pissa" else [])


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_the_tolerance_of_the_decomposition_is_the_methods_own(name):
    # Below what float64 rounds to.
    with pytest.raises(errors.ConvergenceError, match=r"exceeds tolerance 1\.00e-30"):
        start(name, torch.randn(8, 6), 3, tolerance=1e-30)


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_a_frozen_value_found_by_its_file(name):
    method = methods.get(name)
    assert method.name == name
    assert isinstance(method, methods.Method)
    assert method == methods.get(name, methods.method_settings(method))
    assert not hasattr(method, "__dict__")
    assert Path(base.__file__).with_name(f"{name}.py").exists()
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, 1.0)
    assert methods.get(name).start.__doc__
    assert "Source: " in __import__(type(method).__module__, fromlist=["_"]).__doc__


def test_the_names_are_known_and_sorted():
    found = methods.names()
    assert list(found) == sorted(found)
    assert {"pissa", "olora", "milora", "lora", "gaussian", "orthogonal"} <= set(found)
    assert {"pissa", "olora", "milora"} <= set(LIFTING)


def test_unknown_settings_are_refused_with_the_nearest():
    with pytest.raises(errors.UnknownNameError, match=r"'pissa' has no setting 'tolerence'.*'tol"):
        methods.get("pissa", {"tolerence": 1.0})
    with pytest.raises(errors.UnknownNameError, match=r"'lora' has no setting 'std'. It has none"):
        methods.get("lora", {"std": 1.0})


@pytest.fixture
def own_method(monkeypatch):
    """Register a method for one test."""
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    def add(factors_of):
        @methods.register("own")
        @dataclass(frozen=True, slots=True)
        class Own:
            name: ClassVar[str]
            lifts: ClassVar[bool] = True

            def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
                return factors_of(weight, rank)

        return Own

    return add


def halves(weight: Tensor, rank: int) -> Factors:
    return Factors(weight[:rank].clone(), torch.eye(len(weight))[:, :rank].contiguous())


def test_a_new_method_works_by_being_registered(own_method):
    own = own_method(halves)
    model = nn.Sequential(nn.Linear(6, 4))
    for config in (tether.LoraConfig(init="own", rank=2), tether.LoraConfig(init=own(), rank=2)):
        adapter = tether.init(model, config)
        assert adapter.provenance.method == "own"
        assert torch.equal(adapter.layers["0"].anchor.A, model[0].weight[:2])
        assert tether.LoraConfig.from_dict(adapter.config) == dataclasses.replace(
            config, init=own()
        )


def test_registering_checks_the_name_and_the_class(own_method):
    own_method(halves)
    with pytest.raises(errors.ConfigError, match=r"'own' is already .*Own"):
        own_method(halves)
    with pytest.raises(errors.ConfigError, match="must be a frozen dataclass"):
        methods.register("plain")(type("Plain", (), {}))

    @dataclass
    class Thawed:
        pass

    with pytest.raises(errors.ConfigError, match="must be a frozen dataclass"):
        methods.register("thawed")(Thawed)


@pytest.mark.parametrize(
    ("factors_of", "error"),
    [
        (lambda w, r: Factors(torch.full((r, 6), torch.nan), torch.ones(4, r)), "NonFiniteError"),
        (lambda w, r: Factors(torch.ones(r, 4), torch.ones(6, r)), "ShapeMismatchError"),
        (lambda w, r: Factors(torch.ones(r + 1, 6), torch.ones(4, r + 1)), "ShapeMismatchError"),
    ],
    ids=["nan", "shape", "rank"],
)
def test_a_start_that_is_wrong_is_refused_by_site(own_method, factors_of, error):
    own_method(factors_of)
    with pytest.raises(getattr(errors, error), match="site '0'"):
        tether.init(nn.Sequential(nn.Linear(6, 4)), tether.LoraConfig(init="own", rank=2))
