r"""The keys of peft's rank_pattern and alpha_pattern, without running a regex from a file.

peft matches a key as the regex `(.*\.)?(key)$`. The small part of that language in which such keys
are written is understood here: letters, digits, `_`, `-`, `.` (any one character, as in a regex),
`\.` (a dot), `.*` (anything), `^` first and `$` last. Anything else is refused.
"""

import string
from collections.abc import Mapping

from tether.errors import UnsupportedAdapterError
from tether.value import Json

_LITERALS = frozenset(string.ascii_letters + string.digits + "_-")
_MAX_LENGTH, _MAX_KEYS = 512, 4096
_ANY, _ONE = object(), object()


def first_match(patterns: Mapping[str, Json], path: str) -> Json:
    """The value of the first key that matches a path.

    Args:
        patterns: as in the file.
        path: of a site.

    Returns:
        the value, or None.

    Raises:
        UnsupportedAdapterError: a key outside the language above, or too many.
    """
    if len(patterns) > _MAX_KEYS:
        raise UnsupportedAdapterError(f"{len(patterns)} patterns; at most {_MAX_KEYS} are read.")
    for key, value in patterns.items():
        tokens, anchored = _tokens(key)
        starts = {0} if anchored else {0, *(i + 1 for i, c in enumerate(path) if c == ".")}
        if _matches(tokens, path, starts):
            return value
    return None


def _tokens(key: str) -> tuple[list[object], bool]:
    body = key.removeprefix("^")
    anchored, body = body != key, body.removesuffix("$")
    if len(body) > _MAX_LENGTH:
        raise UnsupportedAdapterError(f"pattern of {len(body)} characters is too long.")
    tokens: list[object] = []
    position = 0
    while position < len(body):
        two, one = body[position : position + 2], body[position]
        if two in (".*", r"\."):
            tokens.append(_ANY if two == ".*" else ".")
            position += 2
        elif one in _LITERALS or one == ".":
            tokens.append(_ONE if one == "." else one)
            position += 1
        else:
            raise UnsupportedAdapterError(
                f"pattern {key!r}: {one!r} is regex syntax that is not run from a file. Rewrite "
                r"the pattern with plain names, '\.' and '.*'."
            )
    return tokens, anchored


def _matches(tokens: list[object], text: str, starts: set[int]) -> bool:
    """Whether the tokens match the text from one of the starts to its end.

    All starts at once: time is tokens times text, whatever they are.
    """
    reachable = starts
    for token in tokens:
        if token is _ANY:
            reachable = set(range(min(reachable), len(text) + 1))
        else:
            reachable = {
                i + 1 for i in reachable if i < len(text) and (token is _ONE or text[i] == token)
            }
        if not reachable:
            return False
    return len(text) in reachable
