"""The matcher agrees with the regex that peft would run, on all of its small language."""

import itertools
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import UnsupportedAdapterError
from tether.formats.pattern import first_match

LETTERS = "ab0_-"
TOKENS = [*LETTERS, ".", r"\.", ".*"]
KEYS = st.tuples(st.sampled_from(["", "^"]), st.lists(st.sampled_from(TOKENS), max_size=7))
PATHS = st.text(LETTERS + "...", max_size=10)


def in_peft(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def matched(key: str, path: str) -> bool:
    return first_match({key: 1}, path) == 1


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(key=KEYS, end=st.sampled_from(["", "$"]), path=PATHS)
def test_any_key_and_path(key, end, path):
    key = key[0] + "".join(key[1]) + end
    assert matched(key, path) == in_peft(key, path)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(path=PATHS, data=st.data())
def test_a_key_made_from_the_path(path, data):
    """Keys that match often: the path's end, with parts of it made general."""
    tail = path[data.draw(st.integers(0, len(path))) :]
    key = "".join(
        data.draw(st.sampled_from([c if c != "." else r"\.", c, ".", ".*", ""])) for c in tail
    )
    assert matched(key, path) == in_peft(key, path)


def test_every_short_key_and_path():
    paths = ["".join(p) for n in range(5) for p in itertools.product("ab.", repeat=n)]
    bodies = [
        "".join(t) for n in range(4) for t in itertools.product(["a", *TOKENS[-3:]], repeat=n)
    ]
    outcomes = set()
    for start, body, end in itertools.product(["", "^"], bodies, ["", "$"]):
        key = start + body + end
        for path in paths:
            expected = in_peft(key, path)
            outcomes.add(expected)
            assert matched(key, path) == expected, (key, path)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        (r"layers\.1\..*", "model.layers.1.mlp.up_proj", True),
        (r"layers\.1\..*", "model.layers.11.mlp.up_proj", False),
        ("^model.layers.1", "model.layers.1", True),
        ("^layers.1", "model.layers.1", False),
        ("layers.1.up", "layers-1.up", True),
    ],
)
def test_examples(key, path, expected):
    assert matched(key, path) is in_peft(key, path) is expected


def test_the_first_key_that_matches_wins():
    patterns = {"x": 1, "up": 2, "mlp.up": 3, ".*": 4}
    assert first_match(patterns, "mlp.up") == 2
    assert first_match(patterns, "mlp.down") == 4
    assert first_match({"x": 1}, "mlp.up") is None
    assert first_match({}, "mlp.up") is None
    assert first_match({"up": None, ".*": 1}, "x") == 1


OTHERS = sorted({*string.printable, "é", "\0"} - {*string.ascii_letters, *string.digits, *"_-.\\"})


@pytest.mark.parametrize("character", OTHERS, ids=ascii)
def test_any_other_character_is_refused(character):
    for key in (f"a{character}a", f"{character}a", rf"a\{character}"):
        if key != "^a":
            with pytest.raises(UnsupportedAdapterError, match=re.escape(f"pattern {key!r}")):
                first_match({key: 1}, "a")


@pytest.mark.parametrize(
    "key", ["\\", r"a\\", r"\d", r"\w", "a*", ".**", ".+", "$a", "a^", "^^a", "a$$"]
)
def test_syntax_beyond_the_language_is_refused(key):
    with pytest.raises(UnsupportedAdapterError, match=re.escape(repr(key))):
        first_match({key: 1}, "a")


def test_the_longest_key_and_the_most_keys():
    assert matched("a" * 512, "a" * 512)
    assert first_match({**{f"x{i}": 1 for i in range(4095)}, "a": 2}, "a") == 2
    with pytest.raises(UnsupportedAdapterError, match="513"):
        matched("a" * 513, "a")
    with pytest.raises(UnsupportedAdapterError, match=r"4097.*4096"):
        first_match({f"x{i}": 1 for i in range(4097)}, "a")
