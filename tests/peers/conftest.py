"""Small random models of every kind, and peft called without its notices."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import tether
from tether.value import LayerAdapter

VOCAB = 64
IDS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What peft and transformers say about themselves in every test; anything else they warn of fails.
NOTICES = (
    "`is_gradient_checkpointing` is deprecated",
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
    "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On models this small threads only wait for one another: minutes, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    """Untied, grouped queries, so that no two kinds of projection have the same shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def gemma() -> nn.Module:
    """Its embedding multiplies what it looks up."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.15,
    )
    return Gemma3ForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.15,
    )
    return BertModel(config).eval()


class ConvNet(nn.Module):
    """Convolutions in three, two and one dimensions, with strides and both kinds of padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volume = nn.Conv3d(2, 4, 3, padding=1)
        self.plane = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.line = nn.Conv1d(6, 8, 3, padding="same")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plane(self.volume(x).mean(2)).flatten(2)
        return self.head(self.line(x).mean(2))


@dataclass(frozen=True)
class Case:
    """A base, the same in every call, and the modules to adapt."""

    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: Tensor = IDS


CASES = {
    "linear": Case(llama, LINEAR),
    "bert": Case(bert, ["query", "intermediate.dense", "output.dense"]),
    "conv1d of gpt-2": Case(gpt2, ["c_attn", "c_proj", "c_fc"]),
    "embedding": Case(llama, ["embed_tokens", "lm_head", "q_proj"]),
    "tied embedding": Case(tied_llama, ["embed_tokens", "lm_head"]),
    "embedding of gpt-2": Case(gpt2, ["wte", "wpe", "c_attn"]),
    "scaled embedding": Case(gemma, ["embed_tokens", "q_proj"]),
    "convolutions": Case(
        ConvNet,
        ["volume", "plane", "line", "head"],
        torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)),
    ),
}


def output(model: nn.Module, inputs: Tensor = IDS) -> Tensor:
    """What a model gives: logits, hidden states or a plain tensor."""
    with torch.no_grad():
        result = model(inputs)
    return result if isinstance(result, Tensor) else result[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found − wanted| / |wanted|, in float64."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def disturb(parameters: Iterator[nn.Parameter], size: float = 0.05) -> None:
    """Stand in for training: move every trained factor."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def attached(
    base: nn.Module, size: float = 0.05, name: str = "default", **settings: object
) -> tether.Handle:
    """A handle whose adapter has moved."""
    handle = tether.attach(base, tether.LoraConfig(**settings), name)
    disturb(handle.parameters(), size)
    return handle


def change(layer: LayerAdapter) -> Tensor:
    """ΔW = s·(B·A − B0·A0) in float64, in the weight's own shape."""
    dA, dB = layer.trainable.A.double(), layer.trainable.B.double()
    if layer.anchor is None:
        product = dB @ dA
    else:
        A0, B0 = layer.anchor.A.double(), layer.anchor.B.double()
        product = (B0 + dB) @ (A0 + dA) - B0 @ A0
    return layer.layout.stored(layer.scaling * product)


@contextmanager
def notices_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        for notice in NOTICES:
            warnings.filterwarnings("ignore", message=re.escape(notice))
        yield


def peft_model(base: nn.Module, **settings: object) -> peft.PeftModel:
    with notices_silenced():
        return peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()


def peft_factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of every LoRA layer."""
    return (p for name, p in model.named_parameters() if "lora_" in name)


def peft_trained(base: nn.Module, size: float = 0.05, **settings: object) -> peft.PeftModel:
    model = peft_model(base, **settings)
    disturb(peft_factors(model), size)
    return model


def peft_save(model: peft.PeftModel, folder: Path, **settings: object) -> Path:
    with notices_silenced():
        model.save_pretrained(folder, **settings)
    return folder


def peft_load(base: nn.Module, folder: Path, **settings: object) -> peft.PeftModel:
    """peft's own reading; a missing or unexpected key is a warning, and so an error here."""
    with notices_silenced():
        return peft.PeftModel.from_pretrained(base, folder, **settings).eval()


def peft_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Site path -> peft's layer there."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")
