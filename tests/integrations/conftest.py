"""The tiny model and its text on disk; a small Llama without tied weights, made and on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from tiny_model import model_folder, one_core, text_file

__all__ = ["folder", "model_folder", "one_core", "text_file", "untied"]


@pytest.fixture
def untied(tiny_llama: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **settings: tiny_llama(tie_word_embeddings=False, **settings).eval()


@pytest.fixture
def folder(untied: Callable[..., nn.Module], tmp_path: Path) -> Path:
    untied().save_pretrained(tmp_path / "base")
    return tmp_path / "base"
