"""The page: invented records, and what it says of them."""

import json
import re

import pytest


@pytest.fixture
def invented(tmp_path, script, row):
    """Two records: an aim reached, one missed, nothing wanted, and a certificate that is false."""
    measure = script("measure")
    fast = row(0.4, 26.0, {"product error": 2e-6}, {"route": "lanczos"}, at_least=35, aim=60)
    fast.sides["limit"] = measure.Side([0.21], [0.11])
    slow = row(2.0, 16.0, at_least=10, aim=20)
    slow.name = "slow work"
    plain = row(0.00012, 123.4)
    plain.name, plain.theirs, plain.how = "plain", "peft", "said here"
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    measure.record([fast, slow], paths[0])
    false = row(notes={"broken": "of excess 1e-9, measured 1e-3"})
    false.name = "false work"
    measure.record([plain, false], paths[1], ["the moon: out of reach."])
    machine = {"processor": "Abacus", "cores": 3, "threads": 3, "system": "Sand"}
    for path in paths:
        value = json.loads(path.read_text("utf-8"))
        value |= {"machine": machine, "date": "2030-01-02", "versions": {"peft": "0.21"}}
        path.write_text(json.dumps(value), "utf-8")
    return paths


def test_the_page_says_what_was_reached_and_what_not(script, invented, tmp_path):
    script("page").main(invented, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    for line in (
        "side by side with peft 0.21, and how far",
        "- Machine: Abacus, 3 cores, Sand.",
        "- Measured on 2030-01-02.",
        "at all threads, here 3.",
        "| work | 0.4 | 26 | 0.2 | 13 | 0.21 | 65 |",
        "| slow work | 2 | 16 | 1 | 8 |  | 8 |",
        "| plain | 0.00012 | 123 | 0.00006 | 61.7 |  | 1.03e+06 |",
        "| work | ≥ 35, aim 60 | 65 | aim reached |",
        "| slow work | ≥ 10, aim 20 | 8 | missed |",
        "| false work |  | 20 | missed |",
        "Missed: 2 of 3.",
        "- false work: certificate of excess 1e-9, measured 1e-3.",
        "- slow work: 8 times as fast, at least 10 wanted.",
        "| work | tether | product error 2.0e-06 | route lanczos |",
        "- **plain**: said here.",
        "- the moon: out of reach.",
    ):
        assert line in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for lines in (table.splitlines() for table in tables):
        assert len({line.count("|") for line in lines}) == 1
    assert not re.search(r"[{}`]{3}|\n\n\n|None|nan", text)
    assert all(len(line) <= 100 for line in text.split("## Times")[0].splitlines())


def test_a_page_of_records_from_two_machines_is_refused(script, invented, tmp_path):
    one, two = invented
    value = json.loads(two.read_text("utf-8"))
    value["machine"]["cores"] = 64
    two.write_text(json.dumps(value), "utf-8")
    with pytest.raises(ValueError, match=r"differ in their machine: .*64.* Measure them anew"):
        script("page").main([one, two], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_busy_machine_shows_no_times_on_the_wall_and_says_so(script, invented, tmp_path):
    script("page").main(invented, tmp_path / "page.md", busy=True)
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "| work | 0.4 | 26 | 0.21 | 65 |" in text
    assert "wall s" not in text
    assert "Other work ran on this machine" in text
