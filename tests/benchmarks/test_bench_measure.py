"""Turns, clocks, products and verdicts."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tether.linalg import Certificate


def test_products_with_the_weight_are_seen_whatever_copy_they_use(script):
    products, weight, x = script("products"), torch.randn(40, 30), torch.randn(30, 4)

    def work():
        y = weight @ x  # 4 vectors
        torch.addmm(torch.zeros(30, 4), weight.T, y)  # 4
        low = (weight / 2).bfloat16()
        low[:20] @ x.bfloat16()  # 4, a part of a copy
        y.T @ y  # not the weight

    seen = products.of(work, weight)
    assert (len(seen.found), seen.columns()) == (3, 12)
    assert seen.dtypes() == {torch.float32, torch.bfloat16}
    with FlopCounterMode(display=False) as counter:
        products.alone(seen.found)(None)
    assert counter.get_total_flops() == 2 * 4 * (40 * 30 + 30 * 40 + 20 * 30)


def test_a_product_is_repeated_in_its_layout(script):
    products, weight = script("products"), torch.randn(40, 30)
    seen = products.of(lambda: weight.T @ torch.randn(40, 4), weight)
    again = products.of(lambda: None, weight)
    made = {}
    operand = products._make(made, 0, seen.found[0][0])
    assert (operand.shape, operand.stride()) == (weight.T.shape, weight.T.stride())
    assert not again.found


def test_sides_take_turns_and_preparing_is_not_timed(script, monkeypatch):
    measure = script("measure")
    clock = {"cpu": 0.0, "wall": 0.0}
    monkeypatch.setattr(measure.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["wall"])
    calls = []

    def spend(name, cpu, wall):
        def step(given):
            calls.append((name, given))
            clock["cpu"] += cpu
            clock["wall"] += wall
            return name, torch.get_num_threads()

        return step

    prepare = spend("prepare", 100, 100)
    contenders = {
        "a": measure.Contender(spend("a", 1, 2), lambda: prepare(0)[0]),
        "b": measure.Contender(spend("b", 3, 5)),
    }
    sides, results = measure.run(contenders, 2)
    turn = [("prepare", 0), ("a", "prepare"), ("b", None)]
    assert calls == turn * 4
    assert (sides["a"].cpu, sides["a"].wall) == ([1, 1], [2, 2])
    assert (sides["b"].cpu, sides["b"].wall) == ([3, 3], [5, 5])
    assert results == {"a": ("a", 1), "b": ("b", 1)}


def test_cpu_is_measured_at_one_thread_and_the_wall_at_all(script, monkeypatch):
    measure = script("measure")
    monkeypatch.setattr(measure, "all_threads", lambda: 2)
    threads = []
    measure.run({"a": measure.Contender(lambda _: threads.append(torch.get_num_threads()))}, 1)
    assert threads == [1, 2]


def test_short_work_is_done_more_often(script, monkeypatch):
    measure = script("measure")
    monkeypatch.setattr(measure, "ENOUGH_SECONDS", 1e9)
    sides, _ = measure.run({"a": measure.Contender(lambda _: None)}, 1)
    assert len(sides["a"].cpu) == len(sides["a"].wall) == measure.MOST_CALLS


@pytest.mark.parametrize(
    ("made", "verdict", "misses"),
    [
        ({}, "", []),
        ({"at_least": 20, "aim": 21}, "reached", []),
        ({"at_least": 10, "aim": 20}, "aim reached", []),
        ({"at_least": 10, "aim": "the disk's speed"}, "reached", []),
        ({"at_least": 20.1}, "missed", ["20 times as fast, at least 20.1 wanted"]),
        ({"at_most": 0.06}, "reached", []),
        ({"at_most": 0.05}, "missed", ["0.05 times as long, under 0.05 wanted"]),
        (
            {"at_least": 10, "aim": 20, "accuracy": {"excess": 1e-6}, "found": 2e-6},
            "missed",
            ["excess 2.0e-06, at most 1e-06 wanted"],
        ),
        ({"at_least": 10, "accuracy": {"excess": 1e-6}, "found": 1e-6}, "reached", []),
        (
            {"at_least": 10, "accuracy": {"excess": 1e-6}, "found": float("nan")},
            "missed",
            ["excess nan, at most 1e-06 wanted"],
        ),
    ],
)
def test_a_row_is_judged_by_its_target(row, made, verdict, misses):
    target = {name: value for name, value in made.items() if name != "found"}
    judged = row(errors={"excess": made.get("found", 0.0)}, **target)
    assert (judged.verdict(), judged.misses()) == (verdict, misses)


def test_the_ratio_is_of_medians_and_by_the_targets_clock(row):
    measured = row(at_least=1, clock="wall")
    measured.sides["tether"].wall = [1.0, 1.0, 50.0]
    measured.sides["peft"].wall = [0.1, 4.0, 4.5]
    assert measured.ratio() == 4
    assert row(ours=2.0).ratio() == 10


def test_a_result_that_is_worse_than_certified_is_a_miss(script, row):
    anchors = script("anchors")
    certificate = Certificate("gram", 1e-5, 1e-9, unique=True)
    # An estimate, within a factor of 3.
    good = anchors.certified(certificate, {"product error": 2.9e-5, "excess": 2.9e-9})
    assert row(notes=good).verdict() == ""
    assert good == {
        "route": "gram",
        "unique": "yes",
        "estimated product error": "1.0e-05",
        "estimated excess": "1.0e-09",
    }
    bad = anchors.certified(certificate, {"product error": 4e-5, "excess": 0.0})
    assert row(notes=bad).verdict() == "missed"
    assert row(notes=bad).misses() == ["certificate of product error 1.0e-05, measured 4.0e-05"]
    worse = anchors.certified(certificate, {"product error": 0.0, "excess": float("nan")})
    assert row(notes=worse).misses() == ["certificate of excess 1.0e-09, measured nan"]


def test_the_table_begins_each_row_with_our_side(script, row, capsys):
    missed = row(ours=2.0, at_least=35, aim=60)
    missed.sides = dict(reversed(missed.sides.items()))
    script("measure").show([missed, row()])
    printed = capsys.readouterr().out
    lines = [re.split(r"\s*│\s*", line)[1:-1] for line in printed.splitlines() if "│" in line]
    assert lines == [
        ["work", "tether", "2", "1", "10 missed", "≥ 35, aim 60", ""],
        ["", "peft", "20", "10", "", "", ""],
        ["work", "tether", "1", "0.5", "20", "", ""],
        ["", "peft", "20", "10", "", "", ""],
    ]
    assert "missed: work: 10 times as fast, at least 35 wanted" in printed


def test_no_product_is_promised_where_many_are_equally_good(script):
    certified = script("anchors").certified
    certificate = Certificate("dense", 1e-7, 1e-12, unique=False, fallback="why")
    notes = certified(certificate, {"product error": 1.0, "excess": 0.0})
    assert (notes["unique"], notes["fallback"]) == ("no", "why")
    assert "broken" not in notes
    assert "broken" in certified(certificate, {"product error": 0.0, "excess": 1e-9})
    assert certified(None, {}) == {}
