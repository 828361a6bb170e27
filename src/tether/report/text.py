"""Text from files, fit to be shown."""

import re

_ODD = re.compile(
    # Control characters, halves of surrogate pairs, and the signs that turn text around.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """The text with "�" for what a page cannot hold, or what would disguise it.

    Args:
        text: of any origin.

    Returns:
        text that XML and UTF-8 can hold. It is not escaped.
    """
    return _ODD.sub("�", text)
