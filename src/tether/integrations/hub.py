"""transformers: load a model and its tokenizer from a folder or a hub id, with named errors."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tether.errors import MissingExtraError, ModelError

EXTRA = "Install tether with its extra 'train': pip install '.[train]' in its folder."


def load_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Load a causal language model, in eval mode. Pickled weights and remote code are refused.

    Args:
        name: a folder: of a hub model, the one that `fetch` returns.
        dtype: of its weights.
        device: "cpu", "cuda", …

    Returns:
        a transformers model.

    Raises:
        ModelError: it cannot be found or read, with the reason.
        MissingExtraError: transformers is not installed.
    """
    transformers = import_transformers()
    _check_folder(name)
    with quietly(transformers), _named(name):
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,  # `fetch` has asked the hub already, once
        )
        return model.to(device).eval()


def skeleton(name: str) -> nn.Module:
    """The modules of a language model without their values, from its config.json alone.

    Args:
        name: a folder: of a hub model, the one that `fetch` returns.

    Returns:
        a transformers model on the meta device: the causal language model, or, where its kind has
        none, the model without a head.

    Raises:
        ModelError: there is no config.json that transformers knows, with the reason.
        MissingExtraError: transformers is not installed.
    """
    transformers = import_transformers()
    _check_folder(name)
    with quietly(transformers), _named(name), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False, local_files_only=True
        )
        known = type(config) in transformers.AutoModelForCausalLM._model_mapping
        kind = transformers.AutoModelForCausalLM if known else transformers.AutoModel
        model: nn.Module = kind.from_config(config, trust_remote_code=False)
        return model.eval()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: a folder: of a hub model, the one that `fetch` returns.

    Returns:
        a transformers tokenizer.

    Raises:
        ModelError: it cannot be found or read, with the reason.
        MissingExtraError: transformers is not installed.
    """
    transformers = import_transformers()
    _check_folder(name)
    with quietly(transformers), _named(name):
        return transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=True
        )


def fetch(name: str) -> str:
    """Bring a hub model into the local cache, with the hub's own progress bars.

    Args:
        name: a folder, which is left alone, or an id on the hub.

    Returns:
        the folder: the one given, or the one in the cache.

    Raises:
        ModelError: it cannot be found, or the hub cannot be reached and it is not cached.
        MissingExtraError: transformers is not installed.
    """
    import_transformers()
    _check_folder(name)
    if Path(name).is_dir():
        return name
    import huggingface_hub

    with _named(name):
        return huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["original/*", "consolidated*", "onnx/*"],
        )


def import_transformers() -> Any:
    """Import transformers, or say how to install it.

    Returns:
        the module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"this needs the package 'transformers'. {EXTRA}") from error
    return transformers


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{name}: the folder has no config.json, so it is not a model's.")
    elif path.exists():
        raise ModelError(f"{name}: is a file. Give the folder of a model, or its id on the hub.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder.")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Any failure to load, as one line that names the model."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise ModelError(f"{name}: not enough memory: {_first_line(error)}") from error
        chain = _chain(error)
        kinds = " ".join(type(e).__name__ for e in chain)
        if "GatedRepo" in kinds:
            advice = "It is gated: accept its terms on the hub and log in with `hf auth login`."
        elif "RepositoryNotFound" in kinds:
            advice = "Check the id; for a private model log in with `hf auth login`."
        elif "Connect" in kinds or "LocalEntryNotFound" in kinds or "Offline" in kinds:
            advice = "It is not in the local cache and the hub cannot be reached; give a folder."
        else:
            advice = "Give a folder with config.json and safetensors weights, or an id on the hub."
        raise ModelError(f"{name}: cannot be loaded: {_first_line(error)} {advice}") from error


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n\n")[0].split())
    if not text:
        return type(error).__name__ + "."
    return text[:300] + ("" if text[:300].endswith(".") else ".")


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Keep transformers' own bars and notices out of the output.

    Args:
        transformers: the module.

    Yields:
        nothing.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    # torchao, which transformers imports where it is installed, makes torch warn of itself.
    loggers = [logging.getLogger(n) for n in ("huggingface_hub", "torch.utils._pytree")]
    levels = [each.level for each in loggers]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        # Some bars listen to no switch.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, before in zip(loggers, levels, strict=True):
            each.setLevel(before)
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass.

    Args:
        model: a transformers model.

    Raises:
        ModelError: its architecture cannot.
    """
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if enable is not None:
            try:
                enable({"use_reentrant": False})
            except ValueError as error:
                raise ModelError(f"{type(model).__name__}: {_first_line(error)}") from error
            return
    raise ModelError(f"{type(model).__name__} cannot recompute its activations.")
