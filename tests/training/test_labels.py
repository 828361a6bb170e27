"""Labelled files: what is read, and what is said of what cannot be."""

import json

import pytest

from tether.errors import DataError
from tether.training import labels
from tether.training.labels import Labelled, Row, is_labelled, load


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "rows.csv") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_csv_is_read_by_its_header(write):
    path = write('id,label,text\n1,yes,"good, and\nlong"\n\n2, no ,"a ""b"""\n3,yes,Ω\n')
    assert load(path) == Labelled(
        path,
        (Row("good, and\nlong", "yes", 2), Row('a "b"', "no", 5), Row("Ω", "yes", 6)),
        ("no", "yes"),
    )


def test_jsonl_is_read_by_its_keys(write):
    rows = [{"text": "a\u2028b", "label": 1, "more": None}, {"text": "c", "label": "x"}]
    path = write("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", "r.jsonl")
    found = load(path)
    assert found.rows == (Row("a\u2028b", "1", 1), Row("c", "x", 2))
    assert found.labels == ("1", "x")


def test_what_spreadsheets_write_is_read(write):
    assert load(write(b"\xef\xbb\xbftext,label\r\na,x\r\nb,y\r\n")).labels == ("x", "y")


def test_which_files_are_labelled(write):
    assert is_labelled("anything.csv")
    assert is_labelled(write('\n{"text": "a", "label": "b"}\n', "a.jsonl"))
    assert not is_labelled(write('{"text": "label"}\n{"label": "b"}', "b.jsonl"))
    assert not is_labelled(write('{"label"', "c.jsonl"))
    assert not is_labelled(write(b'\xff{"label": 1}', "d.jsonl"))
    assert not is_labelled(write('"label"', "e.jsonl"))
    assert not is_labelled(write("", "f.jsonl"))
    assert not is_labelled(write("text,label", "g.txt"))
    assert not is_labelled("missing.jsonl")
    assert not is_labelled(None)


TWO = "text,label\na,x\nb,y\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("text,label\n", "has no rows"),
        ("a,x\nb,y\n", r"line 1: has 0 columns 'text' among \['a', 'x'\]"),
        ("text;label\na;x\n", r"line 1: has 0 columns 'text' among \['text;label'\]"),
        ("\ntext,sentiment\na,x\n", r"line 2: has 0 columns 'label'"),
        ("text,label,text\na,x,b\n", r"line 1: has 2 columns 'text'"),
        (TWO + "c, d,x\n", r"line 4: has 3 fields, and the header 2"),
        (TWO + '"c\n\nd",x\nalone\n', r"line 7: has 1 fields"),
        (TWO + '"c,x\n', r"line 4: not valid CSV: unexpected end of data"),
        (TWO + '"c"d,x\n', r"line 4: not valid CSV"),
        (TWO + "z" * 131_073 + ",x\n", r"line 4: not valid CSV: field larger"),
        (TWO + " ,x\n", r"line 4: text is empty"),
        (TWO + "c,\n", r"line 4: label is empty"),
        ("text,label\na,x\nb,x\n\nc,x\n", r"all 3 rows from line 2 to 5 have the label 'x'"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named(write, content, said):
    path = write(content)
    with pytest.raises(DataError, match=said) as caught:
        load(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ("[1]", "line 2: has list"),
        ('{"text": "a"}', r"line 2: has \['text'\]; expected 'text' and 'label'"),
        ('{"text": 3, "label": "x"}', "line 2: text is 3; expected a string"),
        ('{"text": "a", "label": 1.5}', "line 2: label is 1.5; expected a string or a whole"),
        ('{"text": "a", "label": true}', "line 2: label is True"),
        ('{"text": "a", "label": null}', "line 2: label is None"),
        ('{"text": "\\ud800", "label": "x"}', "line 2: holds half a character"),
        ('{"text": "a", "label": "\\udfff"}', "line 2: holds half a character"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(write, line, said):
    path = write('{"text": "a", "label": "x"}\n' + line, "r.jsonl")
    with pytest.raises(DataError, match=said):
        load(path)


def test_too_many_labels_are_no_classes(write):
    rows = [f"text {n},label {n}\n" for n in range(65)]
    assert len(load(write("text,label\n" + "".join(rows[:64]))).labels) == 64
    with pytest.raises(DataError, match=r"line 66: 'label 64' is label 65; at most 64"):
        load(write("text,label\n" + "".join(rows)))


def test_files_that_are_none_are_named(write, tmp_path, monkeypatch):
    for path in (str(tmp_path / "missing.csv"), str(tmp_path)):
        with pytest.raises(DataError, match=r"no such file|must end in"):
            load(path)
    with pytest.raises(DataError, match=r"must end in \.csv or \.jsonl, not '\.txt'"):
        load(write("a", "a.txt"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        load(write(b"text,label\n\xff,x\n"))
    monkeypatch.setattr(labels, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="19 bytes exceed the limit of 10"):
        load(write(TWO))


def test_a_sample_is_drawn_and_keeps_the_order_and_the_labels():
    rows = tuple(Row(str(n), "yn"[n % 2], n + 2) for n in range(100))
    data = Labelled("f", rows, ("n", "y"))
    assert data.sample(None) is data.sample(100) is data.sample(1000) is data
    some = data.sample(50)
    assert some == data.sample(50)
    lines = [row.line for row in some.rows]
    assert lines == sorted(set(lines))
    assert len(lines) == 50
    # Every second row would be one label alone.
    assert 0.3 < some.majority()[1] < 0.7
    assert some.labels == data.sample(1).labels == ("n", "y")


def test_the_majority_is_the_most_frequent_label():
    rows = tuple(Row("t", label, 1) for label in "abbcc")
    assert Labelled("f", rows, ("a", "b", "c")).majority() == ("b", 0.4)
