"""Training a tiny Llama alone, under DDP or under FSDP2, the same way every time."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tether

STEPS, MIDDLE = 5, 3


@dataclass(frozen=True)
class Variant:
    """What is trained, and how.

    Attributes:
        lora: fields of the LoraConfig beside init and rank.
        llama: of the model's configuration.
        checkpointing: whether activations are recomputed.
        half: whether FSDP2 gathers parameters in bfloat16.
        reshard: whether FSDP2 frees gathered parameters after the forward pass.
    """

    lora: dict[str, Any] = field(default_factory=dict)
    llama: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    half: bool = False
    reshard: bool = True


BIASED = {"attention_bias": True, "mlp_bias": True}
WHOLE = Variant({"bias": "all", "modules_to_save": ["norm", "lm_head"]}, BIASED)
VARIANTS = {
    "plain": Variant(),
    "checkpointing": Variant(checkpointing=True),
    "dora": Variant({"use_dora": True}),
    "whole": WHOLE,
    "tied": Variant(
        {"target_modules": ["all-linear", "embed_tokens"]}, {"tie_word_embeddings": True}
    ),
}
ONLY_SHARDED = {
    "gathered": Variant(reshard=False),
    "half": Variant(half=True),
    "half whole": replace(WHOLE, lora=WHOLE.lora | {"use_dora": True}, half=True),
    # All that keeps the most gathered between the passes, in another precision.
    "half gathered": Variant(
        {"target_modules": ["all-linear", "lm_head"]}, half=True, reshard=False
    ),
}


def make_model(variant: Variant) -> transformers.LlamaForCausalLM:
    """The same weights in every call, on every rank."""
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | variant.llama))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    if variant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def attach(model: nn.Module, variant: Variant) -> tether.Handle:
    """A PiSSA adapter of rank 4; its anchor is found by this rank alone."""
    config = tether.LoraConfig(init="pissa", rank=4, **variant.lora)
    return tether.attach(model, tether.init(model, config, distributed=False))


def wrap(model: nn.Module, mode: str, variant: Variant) -> nn.Module:
    """The model as it is trained: "one" leaves it as it is."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if variant.half else None)
        for block in (*model.model.layers, model):
            fully_shard(block, mp_policy=policy, reshard_after_forward=variant.reshard)
    return model


def rows(step: int) -> Tensor:
    """The batch of a step, of all ranks together."""
    return torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))


def mine(tokens: Tensor) -> Tensor:
    """The rows of this rank."""
    if not distributed.is_initialized():
        return tokens
    return tokens[distributed.get_rank() :: distributed.get_world_size()]


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The mean loss over this rank's rows."""
    tokens = mine(rows(step))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = STEPS
) -> list[float]:
    """The loss of each step, over all rows."""
    losses = []
    for step in range(first, last):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if distributed.is_initialized():
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        losses.append(mean.item())
    return losses


def make_optimizer(handle: tether.Handle) -> torch.optim.AdamW:
    """With a weight decay, which pulls at zero and nowhere else."""
    return torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.1)


def whole(tensor: Tensor) -> Tensor:
    """A tensor's values, of all ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def keep(
    model: nn.Module, handle: tether.Handle, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Write what is needed to go on, on any number of ranks. All ranks call it."""
    handle.save(folder / "adapter.safetensors")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if state:  # on rank 0
        torch.save(state, folder / "optimizer.pt")


def go_on(mode: str, variant: Variant, folder: Path) -> tuple[nn.Module, Any, Any]:
    """A new model with what `keep` wrote: wrapped, its handle, its optimizer."""
    model = make_model(variant)
    handle = tether.attach(model, tether.load(folder / "adapter.safetensors"))
    wrapped = wrap(model, mode, variant)
    optimizer = make_optimizer(handle)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(wrapped, optimizer, state, options=options)
    return wrapped, handle, optimizer
