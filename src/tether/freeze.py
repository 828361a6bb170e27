"""What attaching does to the rest of the model, and its undoing: gradients, compiled graphs."""

import sys

from torch import nn

from tether.layers import Record, SiteAdapters, records_of


def freeze(base: nn.Module, record: Record) -> None:
    """Stop the base from training, remembering which parameters did.

    Args:
        base: with the adapter's layers in place.
        record: of the adapter; its `frozen` grows.
    """
    adapters = [m for m in base.modules() if isinstance(m, SiteAdapters)]
    factors = {id(parameter) for module in adapters for parameter in module.parameters()}
    for parameter in base.parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            parameter.requires_grad_(False)
            record.frozen.append(parameter)
    # Re-entrant checkpointing yields no gradients unless the input of a block requires them.
    if _checkpointing(base) and not hasattr(base, "_require_grads_hook"):
        base.enable_input_require_grads()  # type: ignore[operator]
        record.enabled_input_grads = True


def release(base: nn.Module, record: Record) -> None:
    """Let the base train again, unless another adapter still wants it frozen.

    Args:
        base: without the adapter's layers.
        record: of the adapter.
    """
    others = [other for other in records_of(base) if other.trainable]
    if others:
        others[0].frozen += record.frozen
        others[0].enabled_input_grads |= record.enabled_input_grads
        return
    unfreeze(record)
    if record.enabled_input_grads:
        base.disable_input_require_grads()  # type: ignore[operator]


def unfreeze(record: Record) -> None:
    """Let the parameters that an adapter froze require gradients again.

    Args:
        record: of the adapter.
    """
    for parameter in record.frozen:
        parameter.requires_grad_(True)


def reset_compiler() -> None:
    """Forget compiled graphs: torch.compile does not look for hooks added or removed later."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _checkpointing(base: nn.Module) -> bool:
    """Whether a transformers model recomputes its activations; the attribute has two names."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return next((bool(getattr(base, name)) for name in names if hasattr(base, name)), False)
