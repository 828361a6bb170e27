"""The model card says what the file is, and nothing in it can break out of its place."""

import ast
import re
from dataclasses import replace

import pytest
import yaml

from attacks.forge import small_adapter
from tether import Provenance, to_lora
from tether.formats.card import model_card


def card(**origin: object) -> str:
    provenance = Provenance(**{"method": "pissa"} | origin)
    return model_card(replace(to_lora(small_adapter()), provenance=provenance), "bfloat16")


def metadata(text: str) -> dict[str, object]:
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, re.MULTILINE))


def test_what_is_known_is_said():
    text = card(seed=3, base_model="org/base", learning_rate=2e-4, steps=100)
    assert metadata(text) == {
        "base_model": "org/base",
        "library_name": "peft",
        "tags": ["lora", "tether"],
    }
    assert rows(text) == {
        "start": "pissa",
        "sites": "2",
        "rank of this file": "4",
        "dtype": "bfloat16",
        "learning rate": "0.0002",
        "steps": "100",
        "seed": "3",
    }


def test_what_is_not_known_is_left_out():
    text = card()
    assert metadata(text) == {"library_name": "peft", "tags": ["lora", "tether"]}
    assert set(rows(text)) == {"start", "sites", "rank of this file", "dtype"}
    assert 'from_pretrained("the base model")' in text


@pytest.mark.parametrize(
    "name", ["é", "基座/модель", "😀 𝔘", 'a "b" \\n', "a\nb: c", "\x7f\x85\u2028", ""]
)
def test_a_base_of_any_name_is_quoted_for_yaml_and_for_python(name):
    text = card(base_model=name)
    assert metadata(text)["base_model"] == name
    (literal,) = re.findall(r"AutoModelForCausalLM\.from_pretrained\((.*)\)\n", text)
    assert ast.literal_eval(literal) == name


@pytest.mark.parametrize(
    "method",
    ["x\n# Owned", "x |\n\n---\nlicense: mit\n---", "x\r\n<script>", "a | b | c", "`x"],
)
def test_a_method_of_any_name_stays_in_its_cell(method):
    """It may come from a file of somebody else's."""
    clean, text = card(), card(method=method)
    assert len(text.splitlines()) == len(clean.splitlines())
    (row,) = [line for line in text.splitlines() if line.startswith("| start")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert text.replace(row, "| start | pissa |") == clean
    assert "<script>" not in text


def test_the_program_in_it_is_python():
    program = card(base_model="org/base").split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {
        "AutoModelForCausalLM.from_pretrained",
        "PeftModel.from_pretrained",
    }
