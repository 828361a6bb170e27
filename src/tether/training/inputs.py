"""What a run starts from: the base model, its tokenizer, the text."""

from typing import Any

from torch import nn

from tether.integrations import hub, smollm2
from tether.training.data import Sequences, load, split
from tether.training.report import Reporter
from tether.training.settings import DTYPES, Settings


def load_base(settings: Settings, reporter: Reporter) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer.

    Args:
        settings: model, dtype and device are used.
        reporter: shows progress.

    Returns:
        model in eval mode on its device, tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    device = settings.torch_device()
    name = settings.model
    if name is None:
        with reporter.task("Preparing the default model (once)"):
            name = str(smollm2.folder())
    folder = hub.fetch(name)
    with reporter.task("Loading the model"):
        tokenizer = hub.load_tokenizer(folder)
        model = hub.load_model(folder, DTYPES[settings.dtype], str(device))
    # What others will load it by, not where the cache keeps it.
    model.config._name_or_path = name  # type: ignore[union-attr]
    if settings.checkpointing:
        hub.enable_checkpointing(model)
    return model, tokenizer


def load_held_out(settings: Settings, tokenizer: Any) -> Sequences:
    """Only the held-out sequences.

    Args:
        settings: eval_data used whole, or the held-out part of data.
        tokenizer: of the model.

    Returns:
        for evaluation.

    Raises:
        DataError: the text cannot be used.
    """
    if settings.eval_data is not None:
        return load(settings.eval_data, tokenizer, settings.block)
    return load_data(settings, tokenizer)[1]


def load_data(settings: Settings, tokenizer: Any) -> tuple[Sequences, Sequences]:
    """The training and the held-out sequences.

    Args:
        settings: data, eval_data, held_out and block are used.
        tokenizer: of the model.

    Returns:
        for training, for evaluation.

    Raises:
        DataError: the text cannot be used.
    """
    data = load(settings.data, tokenizer, settings.block)
    if settings.eval_data is None:
        return split(data, settings.held_out, settings.data or "Python's documentation")
    return data, load(settings.eval_data, tokenizer, settings.block)


def load_all(settings: Settings, reporter: Reporter) -> tuple[nn.Module, Any, Sequences, Sequences]:
    """Model, tokenizer, training and held-out sequences.

    Args:
        settings: of the run.
        reporter: shows progress.

    Returns:
        all four.
    """
    model, tokenizer = load_base(settings, reporter)
    with reporter.task("Reading the text"):
        data, held_out = load_data(settings, tokenizer)
    return model, tokenizer, data, held_out
