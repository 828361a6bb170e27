"""What an adapted Trainer cannot do, said before it begins."""

from typing import Any

from transformers import Trainer

from tether.errors import ConfigError
from tether.integrations.transformers.arguments import Arguments
from tether.integrations.transformers.model import check_head

_SEAMS = (
    *("_save", "_save_checkpoint", "_load_from_checkpoint", "_load_best_model"),
    *("_get_output_dir", "_push_from_checkpoint", "_finalize_training"),
)


def check_arguments(given: Arguments) -> None:
    """Raise for an argument that excludes an adapter.

    Args:
        given: what the Trainer is to be made with.

    Raises:
        ConfigError: naming the argument.
    """
    if isinstance(given.get("model"), str):
        raise ConfigError(
            f"model={given.get('model')!r} is a name, without an adapter. Load the model, attach "
            "an adapter to it, and give that."
        )
    if given.get("peft_config") is not None:
        raise ConfigError("peft_config: the model has an adapter of tether's. Leave it out.")
    if getattr(given.get("args"), "use_vllm", False):
        raise ConfigError(
            "use_vllm: vLLM would be given the base's weights without the adapter, and sample from "
            "that. Give use_vllm=False."
        )
    if getattr(given.get("args"), "sync_ref_model", False) and given.get("ref_model") is None:
        raise ConfigError(
            "sync_ref_model needs a reference model of its own: without ref_model the reference "
            "is the base, which never changes. Give a ref_model, or leave it out."
        )


def check_trainer(trainer: Any) -> None:
    """Raise for what can only be seen once the Trainer is made.

    Args:
        trainer: made, not yet trained.

    Raises:
        ConfigError: a version without the methods that are overridden, a model that is sharded, an
            output head or a dropout that TRL would pass over.
    """
    missing = [name for name in _SEAMS if not hasattr(Trainer, name)]
    if missing:
        raise ConfigError(
            f"this version of transformers has no Trainer.{missing[0]}, without which checkpoints "
            "would hold the base. Use another version: 5.23 is known to work."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "FSDP and DeepSpeed save the base themselves. Use one process, or several with DDP; or "
            "shard the model with fully_shard in a loop of your own: see "
            "docs/guides/several-processes.md."
        )
    model = trainer.model
    trl = any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)
    if trl and "forward" in vars(model):
        check_head(model)
    dropped = [layer.dropout for layer in trainer.adapter.source().about.layers.values()]
    if getattr(trainer.args, "disable_dropout", False) and any(dropped):
        raise ConfigError(
            f"disable_dropout is set, and the adapter's dropout is {max(dropped)}. Give "
            "disable_dropout=False, or an adapter with dropout=0."
        )
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    settings = [getattr(trainer.args, name, None) or {} for name in names]
    again = any(found.get("use_reentrant") for found in settings)
    # Re-entrant checkpointing yields no gradients unless the input of a block requires them.
    if again and not hasattr(model, "_require_grads_hook"):
        model.enable_input_require_grads()
