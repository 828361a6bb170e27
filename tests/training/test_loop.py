"""The loop does what it says: schedule, order, accumulation, clipping, and no step into NaN."""

import math

import pytest
import torch
from torch import Tensor

from tether.errors import NonFiniteError
from tether.training import loop
from tether.training.evaluate import token_loss
from tether.training.settings import Settings

from .conftest import examples

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("number", "share"),
    [
        (1, 0.1),
        (5, 0.5),
        (10, 1.0),  # the end of the warm-up
        (11, 1.0),  # the start of the cosine
        (41, (1 + math.cos(math.pi / 3)) / 2),
        (56, 0.5),
        (100, (1 - math.cos(math.pi / 90)) / 2),
        (101, 0.0),  # the first step after the run
    ],
)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(number, share):
    settings = Settings(learning_rate=3e-4, warmup=0.1)
    assert loop.learning_rate(number, 100, settings) == pytest.approx(3e-4 * share, abs=1e-12)


def test_without_warm_up_the_first_rate_is_the_top():
    settings = Settings(learning_rate=3e-4, warmup=0.0)
    assert loop.learning_rate(1, 1, settings) == loop.learning_rate(1, 9, settings) == 3e-4


@pytest.mark.parametrize(("count", "per_step"), [(12, 4), (10, 4), (3, 7), (5, 5), (1, 2)])
def test_every_epoch_sees_every_sequence_once(count, per_step):
    numbers = range(1, 3 * count + 1)
    seen = [i for n in numbers for i in loop.order(n, count, per_step, seed=1)]
    epochs = [seen[i : i + count] for i in range(0, len(seen), count)]
    assert len(epochs) == 3 * per_step
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_the_order_depends_on_the_step_and_the_seed_alone():
    def draw() -> list[list[int]]:
        return [loop.order(n, 50, 50, seed) for n in (1, 2) for seed in (0, 1)]

    first = draw()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(map(tuple, first))) == 4


def test_every_seed_that_the_adapter_takes_gives_an_order():
    assert sorted(loop.order(1, 4, 4, seed=2**63 - 1)) == [0, 1, 2, 3]


def gradients(run) -> tuple[loop.Step, list[Tensor]]:
    """The first step and its gradients."""
    found: list[Tensor] = []
    (step,) = run.train(
        examples(8),
        until=1,
        look=lambda: found.extend(p.grad.clone() for p in run.handle.parameters()),
    )
    return step, found


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_follows_the_mean_over_all_its_tokens(batch_size, accumulation, live):
    run = live(batch_size=batch_size, accumulation=accumulation, clip=0.0)
    other = live()
    data = examples(8)
    total, tokens = torch.zeros(()), 0
    for index in loop.order(1, len(data), 4, seed=0):
        loss, number = token_loss(other.model.train(), data.batch([index], CPU))
        total, tokens = total + loss, tokens + number
    mean = total / tokens
    wanted = torch.autograd.grad(mean, list(other.handle.parameters()))
    step, found = gradients(run)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert step.tokens == tokens
    assert step.loss == pytest.approx(mean.item(), rel=1e-6)
    norm = torch.stack([g.norm() for g in wanted]).norm()
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_a_long_gradient_is_clipped_and_its_norm_reported_as_it_was(live):
    free, whole = gradients(live(clip=0.0))
    limit = free.gradient_norm / 3
    step, clipped = gradients(live(clip=limit))
    assert step.gradient_norm == free.gradient_norm
    for one, two in zip(clipped, whole, strict=True):
        torch.testing.assert_close(one, two / 3, rtol=1e-4, atol=1e-9)
    assert all(map(torch.equal, gradients(live(clip=3 * limit * 1.01))[1], whole))


def poison_weight(run, patch) -> None:
    run.model.lm_head.weight.data[0, 0] = math.nan


def poison_loss(run, patch) -> None:
    """Infinite, with finite gradients."""

    def infinite(*arguments: object) -> tuple[Tensor, int]:
        loss, tokens = token_loss(*arguments)
        return loss + math.inf, tokens

    patch.setattr(loop, "token_loss", infinite)


def poison_gradient(run, patch) -> None:
    next(run.handle.parameters()).register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("poison", [poison_weight, poison_loss, poison_gradient])
def test_a_step_that_is_not_finite_is_not_taken(poison, live, monkeypatch):
    run = live()
    run.train(examples(8), until=1)
    poison(run, monkeypatch)
    before = run.state()
    with pytest.raises(NonFiniteError, match=r"^step 2: loss .*not taken.*learning rate"):
        run.train(examples(8), first=1)
    assert all(map(torch.equal, before, run.state()))


def test_the_loss_falls_and_the_optimizer_holds_the_factors_alone(live):
    run = live(steps=40)
    base = [p for p in run.model.parameters() if not p.requires_grad]
    before = [p.clone() for p in base]
    rates: list[float] = []
    steps = run.train(examples(8), look=lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert [step.number for step in steps] == list(range(1, 41))
    assert rates == [step.learning_rate for step in steps]
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    (group,) = run.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, run.handle.parameters()))
    assert all(map(torch.equal, before, base))
    assert all(p.grad is None for p in run.model.parameters())


def test_weight_decay_pulls_towards_the_base(live):
    def distance(weight_decay: float) -> float:
        run = live(steps=10, weight_decay=weight_decay)
        run.train(examples(8))
        return float(sum(p.detach().norm() for p in run.handle.parameters()))

    assert distance(20.0) < 0.9 * distance(0.0)
