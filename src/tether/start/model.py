"""What a model says of itself."""

from torch import nn


def original(model: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself.

    Args:
        model: wrapped or not.

    Returns:
        the module whose paths are the user's own.
    """
    inner = model._modules.get("_orig_mod")
    return inner if inner is not None else model


def base_name(model: nn.Module) -> str | None:
    """The name or path a transformers model was loaded from.

    Args:
        model: any module.

    Returns:
        the name, or None if the model does not know.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def base_class(model: nn.Module) -> str | None:
    """The class of a transformers model, by which others load it.

    Args:
        model: any module.

    Returns:
        "transformers.….LlamaForCausalLM", or None for a model of another library.
    """
    cls = type(model)
    full = f"{cls.__module__}.{cls.__qualname__}"
    return full if full.startswith("transformers.") else None
