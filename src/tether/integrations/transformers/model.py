"""What a Trainer must be given: a model with one trainable adapter, and nothing else trained."""

from typing import Any

from torch import nn

from tether.errors import ConfigError
from tether.handle import Handle, handles


def trained_handle(model: nn.Module) -> Handle:
    """The adapter that is trained.

    Args:
        model: with exactly one trainable adapter; any number of frozen ones beside it.

    Returns:
        its handle.

    Raises:
        ConfigError: there is none, or several.
    """
    found = handles(model)
    trainable = [handle for handle in found.values() if handle.record.trainable]
    if len(trainable) == 1:
        return trainable[0]
    if trainable:
        names = ", ".join(repr(handle.name) for handle in trainable)
        raise ConfigError(
            f"the model has {len(trainable)} trainable adapters: {names}. A Trainer trains one: "
            "attach the others with trainable=False."
        )
    others = f" ({len(found)} frozen: {', '.join(map(repr, found))})" if found else ""
    raise ConfigError(
        f"the model has no trainable adapter of tether's{others}. Attach one before the Trainer "
        "is made: tether.attach(model, tether.LoraConfig(...))."
    )


def check_model(model: nn.Module) -> None:
    """Raise unless all that is trained is one adapter, which a checkpoint then holds.

    Args:
        model: to be trained.

    Raises:
        ConfigError: no adapter or several, or a parameter of the base requires gradients.
    """
    handle = trained_handle(model)
    mine = {id(parameter) for parameter in handle.parameters()}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
    if names:
        raise ConfigError(
            f"{names[0]!r}"
            + (f" and {len(names) - 1} more parameters" if len(names) > 1 else "")
            + " of the base would be trained too, and not be saved: checkpoints hold the adapter "
            "alone. Train that module whole, with modules_to_save in the LoraConfig, or call "
            "requires_grad_(False)."
        )


def check_head(model: nn.Module) -> None:
    """Raise if the adapter changes an output head that is never called.

    TRL multiplies with `lm_head.weight` itself, so neither a hook there nor a copy takes part.

    Args:
        model: that a trainer of TRL's has made ready.

    Raises:
        ConfigError: naming the head.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    about = trained_handle(model).source().about
    changed = {*about.layers, *about.biases, *about.modules}
    for name, module in model.named_modules():
        if module is head and name in changed:
            raise ConfigError(
                f"the adapter changes {name!r}, whose weight TRL reads without calling the "
                f"module: it would not be trained. Exclude it: exclude_modules=[{name!r}]."
            )
