"""The two ways of Lanczos."""

import pytest

from tether.linalg import top


@pytest.fixture(params=["gram", "lanczos"])
def route(request, monkeypatch):
    """The way for short sides of a few hundred, which are above `_SMALL`."""
    if request.param == "lanczos":
        monkeypatch.setattr(top, "_GRAM", 256)
    return request.param
