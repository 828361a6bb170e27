"""A cache of the test's own."""

from pathlib import Path

import pytest

from tether.cache import store


@pytest.fixture
def anchors(tmp_path, monkeypatch) -> Path:
    """The folder of an anchor cache that is switched on, and empty."""
    monkeypatch.setenv("TETHER_NO_CACHE", "0")
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_WARNED", set())
    return tmp_path / "cache" / "anchors"
