"""Paths of modules: which patterns select them, and the shortest names that do."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tether.value import CHILD


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern selects a module path.

    Args:
        pattern: a whole path; one or more of its last components ("q_proj", "self_attn.q_proj");
            or, if it contains any of *?[, a glob over the whole path.
        path: of a module.

    Returns:
        True if it does.
    """
    if any(c in pattern for c in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def layer_index(path: str) -> int | None:
    """The first component of a path that is a number: the index of the layer it lies in.

    Args:
        path: of a module.

    Returns:
        the index, or None if the path has none.
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without the adapters that hang on them.

    Args:
        model: any module.

    Yields:
        (path, module), in the model's order; shared modules once.
    """
    stack = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = path + "." if path else ""
        children = [(prefix + n, c) for n, c in module.named_children() if n != CHILD]
        stack.extend(reversed(children))


def short_targets(
    model: nn.Module, paths: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The shortest names that select these paths among all modules.

    Args:
        model: the model that holds them.
        paths: of its sites.

    Returns:
        names: last components where every module so named is a site, whole paths otherwise; and
        the paths that these names select besides ("block.proj" ends in the whole path "proj").
        Both sorted.
    """
    wanted = set(paths)
    # The last components of modules that are no sites: such a name would select too much.
    others = {p for p, _ in base_modules(model) if p not in wanted}
    taken = {p.rsplit(".", 1)[-1] for p in others}
    names: set[str] = set()
    for path in paths:
        last = path.rsplit(".", 1)[-1]
        names.add(path if last.isdigit() or last in taken else last)
    besides = {p for p in others if not names.isdisjoint(_endings(p))}
    return tuple(sorted(names)), tuple(sorted(besides))


def _endings(path: str) -> list[str]:
    """The path and what is left of it without its first components: what can select it."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
