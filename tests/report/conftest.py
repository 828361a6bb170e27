"""Adapters with known singular values, and pages as a browser's parser sees them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest
import torch

import tether
from tether.provenance import Fingerprint, Provenance
from tether.report.page import Page, render
from tether.value import Adapter, Factors, LayerAdapter, Layout

SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) with orthonormal columns, float64."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def layer(values: Sequence[float], shape: tuple[int, int] = (12, 9)) -> LayerAdapter:
    """A plain layer whose ΔW has these singular values."""
    s = torch.tensor(values, dtype=torch.float64)
    u, v = orthonormal(shape[0], len(s)), orthonormal(shape[1], len(s))
    return LayerAdapter(Factors((s[:, None] * v.T), u), None, 1.0, Layout("linear", shape))


def adapter(
    layers: dict[str, LayerAdapter], weight: float | None = 10.0, **origin: object
) -> Adapter:
    """An adapter on weights of one norm."""
    prints = {
        path: Fingerprint(one.layout.shape, "float32", "0" * 64, "0" * 64, "0" * 64, weight)
        for path, one in layers.items()
        if weight is not None
    }
    return Adapter(layers, Provenance("pissa", fingerprints=prints, **origin))


class Parsed:
    """A page, parsed as HTML5 without an error."""

    def __init__(self, text: str) -> None:
        parser = html5lib.HTMLParser(strict=True)
        self.text, self.root = text, parser.parse(text)

    def all(self, tag: str) -> list[ElementTree.Element]:
        """Elements of HTML by their name."""
        return list(self.root.iter(f"{HTML}{tag}"))

    def svg(self, tag: str) -> list[ElementTree.Element]:
        """Elements of pictures by their name."""
        return list(self.root.iter(f"{SVG}{tag}"))

    def words(self, element: ElementTree.Element) -> str:
        """All text in an element."""
        return "".join(element.itertext())


def parsed(page: Page) -> Parsed:
    """A page of values."""
    return Parsed(render(page))


@pytest.fixture
def trained(tiny_llama: Callable[..., torch.nn.Module], tmp_path: Path) -> tuple[Path, Adapter]:
    """A base on disk, and an adapter of it that has moved."""
    model = tiny_llama(initializer_range=0.15)
    model.save_pretrained(tmp_path / "base")
    handle = tether.attach(model, tether.LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return tmp_path / "base", handle.snapshot()
