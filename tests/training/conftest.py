"""A run in memory: model, adapter and optimizer, without files."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import tether
from tether.training import loop
from tether.training.data import IGNORED, Sequences
from tether.training.loop import Step
from tether.training.settings import Settings
from tiny_model import make_tokenizer, model_folder, one_core, text_file

__all__ = ["model_folder", "one_core", "text_file"]


def examples(count: int) -> Sequences:
    """Sequences of unequal length, with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(32, (4 + i % 5,), generator=generator).tolist() for i in range(count)]
    labels = [[IGNORED] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(tokens)]
    return Sequences(tuple(map(tuple, tokens)), tuple(map(tuple, labels)), packed=False)


@dataclass
class Live:
    """An adapter in training."""

    model: nn.Module
    handle: tether.Handle
    optimizer: torch.optim.AdamW
    settings: Settings

    def train(
        self,
        data: Sequences,
        first: int = 0,
        until: int | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> list[Step]:
        """Run steps; `look` is called after each."""
        steps: list[Step] = []

        def on_step(step: Step) -> bool:
            steps.append(step)
            look()
            return step.number == until

        loop.train(
            self.model,
            self.handle,
            self.optimizer,
            data,
            self.settings,
            first=first,
            on_step=on_step,
        )
        return steps

    def state(self) -> list[Tensor]:
        """Copies of all that training changes: factors, moments, random state."""
        tensors = [torch.get_rng_state()]
        for parameter in self.handle.parameters():
            tensors += [parameter.detach(), *self.optimizer.state[parameter].values()]
        return [tensor.clone() for tensor in tensors]


@pytest.fixture
def live(tiny_llama: Callable[..., nn.Module]) -> Callable[..., Live]:
    """Make a run in memory, the same every time."""

    def make(lora: dict[str, object] | None = None, **changes: object) -> Live:
        config = tether.LoraConfig(**{"rank": 2} | (lora or {}))
        settings = Settings(**{"learning_rate": 1e-2, "lora": config} | changes)
        model = tiny_llama(initializer_range=0.15)
        handle = tether.attach(model, config)
        return Live(model, handle, loop.make_optimizer(handle, settings), settings)

    return make


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer; may be changed."""
    return make_tokenizer()
