"""The shape of the package: imports point one way, and what is public is said and described."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tether

ORDER = (
    "errors",
    "statistics",
    "ranks",
    "linalg",
    "provenance",
    "layout",
    "value",
    "algebra",
    "combine",
    "precision",
    "fingerprints",
    "compare",
    "methods",
    "quantized",
    "sites",
    "whole",
    "config",
    "disk",
    "fs",
    "formats",
    "checkpoint",
    "cache",
    "start",
    "stream",
    "source",
    "rescue",
    "merged",
    "layers",
    "switch",
    "rows",
    "freeze",
    "memory",
    "offload",
    "saving",
    "handle",
    "drift",
    "attach",
    "swap",
    "merge",
    "conversion",
    "verify",
    "export",
    "integrations",
    "training",
    "report",
    "cli",
)
ROOT = Path(tether.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem[0] != "_")


def part_of(path: Path) -> str:
    """The first component of a file's module below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too, as an absolute name."""
    package = ("tether", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_used(path: Path) -> set[str]:
    """The parts of tether that a file uses; "" is the package's own public names."""
    names = [name.split(".") for name in imported(path)]
    inside = [(name[1] if len(name) > 1 else "") for name in names if name[0] == "tether"]
    return {name if name in ORDER else "" for name in inside}


PUBLIC = max(parts_used(ROOT / "__init__.py") - {""}, key=ORDER.index)


def test_every_file_has_a_place_in_the_order():
    assert {part_of(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    mine = part_of(path)
    for used in parts_used(path) - {mine}:
        # The package's public names come after the last part that they are taken from.
        place = ORDER.index(used or PUBLIC) + (0 if used else 0.5)
        assert place < ORDER.index(mine), f"{mine} imports {used or 'tether'}"


@pytest.mark.parametrize("library", ["transformers", "peft", "typer", "rich"])
def test_only_the_edges_use_other_software(library):
    edges = {"integrations", "training", "cli"}
    users = {
        part_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    # A table of memory knows how to show itself in a terminal.
    assert users <= edges | ({"memory"} if library == "rich" else set())


def test_importing_tether_imports_neither_transformers_nor_peft():
    heavy = ["transformers", "peft", "accelerate", "typer", "rich"]
    code = f"import sys, tether; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_what_is_public_is_what_all_says():
    parts = {name for name in ORDER if inspect.ismodule(getattr(tether, name, None))}
    public = {name for name in vars(tether) if not name.startswith("_")}
    assert public - parts == set(tether.__all__)
    assert list(tether.__all__) == sorted(tether.__all__)
    assert all(not inspect.ismodule(getattr(tether, name)) for name in tether.__all__)


def public_things() -> dict[str, object]:
    """The public names, and what their classes have that is public."""
    things = {name: getattr(tether, name) for name in tether.__all__}
    for name, thing in list(things.items()):
        if inspect.isclass(thing):
            things |= {
                f"{name}.{key}": member
                for key, member in vars(thing).items()
                if not key.startswith("_") and (callable(member) or isinstance(member, property))
            }
    return things


@pytest.mark.parametrize("name", public_things())
def test_what_is_public_is_described(name):
    thing = public_things()[name]
    text = inspect.getdoc(thing)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(thing):
        parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        for parameter in parameters:
            assert f"{parameter}: " in text, f"{parameter} is not described"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_and_class_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
