"""The same bitsandbytes on every machine."""

import pytest

from .bases import bitsandbytes


@pytest.fixture(autouse=True)
def _no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with bfloat16 products it packs weights anew in the first evaluation."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
