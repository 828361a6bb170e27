"""What the tests of pages use: an empty folder, and one thread."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pages import DOCS, Reader


@pytest.fixture
def read_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], dict[str, object]]]:
    """Run a page, named from docs/, in an empty folder; the scope of its python blocks."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # Sums of as many parts as in the processes that a page starts.
    torch.set_num_threads(1)
    yield lambda name: Reader(DOCS / name).read()
    torch.set_num_threads(threads)
