"""What a training step costs, beside peft's LoRA of the same rank: time, and what autograd keeps.

python benchmarks/step.py [--rows 'step*'] [--repeats 3] [--output bench-out/step.json]

A Llama with SmolLM2's widths (576, 1536), random weights and fewer layers; rank 16 on all linear
layers, AdamW; PiSSA here and LoRA there, which costs the same as peft's PiSSA once it has started.
The rows "sites" run the adapters alone, on layers whose own output is free: where the processor
has no bfloat16 products, the base is all that a bfloat16 step takes.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import measure
import peft
import torch
import typer
from measure import Contender, Row, Target
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import tether

NAMES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
RANK, BATCH, LENGTH, LAYERS, VOCABULARY = 16, 4, 256, 4, 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, what is trained of it, and one step.

    Attributes:
        model: with an adapter, or frozen.
        parameters: the adapter's, all that the optimizer has.
        forward: gives the loss.
        extra: bytes that the adapter adds to the model: its parameters and buffers.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    forward: Callable[[], Tensor]
    extra: int

    def step(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


class Free(nn.Linear):
    """A layer whose output costs nothing, so that what is timed is the adapter."""

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "known", None) is None:
            self.known = torch.randn(*x.shape[:-1], self.out_features, dtype=x.dtype)
        return self.known


class Sites(nn.Module):
    """The seven sites of a block of SmolLM2, side by side; the inputs are shared as there."""

    def __init__(self) -> None:
        super().__init__()
        width, inner, few = 576, 1536, 192
        shapes = [(width, width), (width, few), (width, few), (width, width)]
        shapes += [(width, inner), (width, inner), (inner, width)]
        for name, shape in zip(NAMES, shapes, strict=True):
            self.add_module(name, Free(*shape, bias=False))

    def forward(self, attention: Tensor, mixed: Tensor, mlp: Tensor, hidden: Tensor) -> Tensor:
        inputs = (attention, attention, attention, mixed, mlp, mlp, hidden)
        outputs = [
            self.get_submodule(name)(x).sum(dtype=torch.float32)
            for name, x in zip(NAMES, inputs, strict=True)
        ]
        return torch.stack(outputs).sum()


def adapted(model: nn.Module, side: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model with an adapter of one of the libraries, or frozen."""
    before = size(model)
    if side == "tether":
        config = tether.LoraConfig(init="pissa", rank=RANK, target_modules=NAMES)
        handle = tether.attach(model, config)
        parameters = list(handle.parameters())
    elif side == "peft":
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES)
        model = peft.get_peft_model(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        parameters = []
        model.requires_grad_(False)
    for parameter in parameters:  # not the first step, where half of the products are with zeros
        parameter.data += 1e-3 * torch.randn_like(parameter)
    return model.train(), parameters, size(model) - before


def size(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def llama(side: str, dtype: torch.dtype) -> Trained:
    """A Llama, and one batch of random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    # The gradient reaches down to the first layer on every side, as it does below an adapter.
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model, parameters, extra = adapted(model, side)
    return Trained(model, parameters, lambda: model(inputs_embeds=embedded, labels=ids).loss, extra)


def sites(side: str, dtype: torch.dtype) -> Trained:
    """One block's sites, and random inputs that require gradients, as they do in a model."""
    torch.manual_seed(0)
    widths = (576, 576, 576, 1536)
    inputs = [
        torch.randn(BATCH, LENGTH, width, dtype=dtype, requires_grad=True) for width in widths
    ]
    model, parameters, extra = adapted(Sites().to(dtype), side)
    return Trained(model, parameters, lambda: model(*inputs), extra)


def kept(trained: Trained) -> int:
    """Bytes that autograd keeps from the forward for the backward pass, beside the parameters."""
    own = {
        t.untyped_storage().data_ptr()
        for t in (*trained.model.parameters(), *trained.model.buffers())
    }
    seen: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (tensor, storage.nbytes())  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trained.forward()
    return sum(number for _, number in seen.values())


def memory(trained: Trained, base: int) -> dict[str, float]:
    """What a step needs above the frozen base, in MB: activations, and all with AdamW."""
    activations = kept(trained) - base
    state = 3 * sum(p.nbytes for p in trained.parameters)  # gradient and two moments
    return {
        "activations MB": activations / 1e6,
        "all MB": (activations + state + trained.extra) / 1e6,
    }


def row(kind: str, dtype: str, repeats: int) -> Row:
    """One row: a step of both libraries; for the whole model also of the frozen base."""
    make = {"step": llama, "sites": sites}[kind]
    names = ("tether", "peft", measure.LIMIT) if kind == "step" else ("tether", "peft")
    made = {name: make(name, DTYPES[dtype]) for name in names}
    contenders = {name: contender(trained) for name, trained in made.items()}
    sides, _ = measure.run(contenders, repeats)
    base = kept(made[measure.LIMIT]) if kind == "step" else 0
    for name in ("tether", "peft"):
        sides[name].accuracy = memory(made[name], base)
    target = None
    if kind == "step":
        half = {"activations MB": sides["peft"].accuracy["activations MB"] / 2}
        targets = {"float32": Target(at_most=1.03), "bfloat16": Target(1.1, accuracy=half)}
        target = targets[dtype]
    what = f"{LAYERS} layers" if kind == "step" else "the adapters of one block alone"
    how = f"forward, backward, AdamW; {what}, batch {BATCH}×{LENGTH}, r {RANK}, {dtype}"
    limit = "the frozen base's forward and backward" if kind == "step" else ""
    return Row(f"{kind} {dtype}", how, sides, target=target, limit=limit)


def contender(trained: Trained) -> Contender:
    """Steps of a training."""
    optimizer = torch.optim.AdamW(trained.parameters, lr=1e-5) if trained.parameters else None
    trained.step(optimizer)
    return Contender(lambda _: trained.step(optimizer))


def measured(pattern: str, repeats: int, output: Path | None) -> Iterable[Row]:
    """The rows whose names fit; the record is written anew after each."""
    rows: list[Row] = []
    for kind in ("step", "sites"):
        for dtype in DTYPES:
            if fnmatch(f"{kind} {dtype}", pattern):
                measure.say(f"{kind} {dtype}")
                rows.append(row(kind, dtype, repeats))
                if output is not None:
                    measure.record(rows, output)
    return rows


def main(
    rows: Annotated[str, typer.Option(help="A pattern, such as 'step*' or '*bfloat16'.")] = "*",
    repeats: Annotated[int, typer.Option(help="Turns at one thread, and at all.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON of what was measured.")] = None,
) -> None:
    """Measure and print all rows."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    measure.show(measured(rows, repeats, output))


if __name__ == "__main__":
    typer.run(main)
