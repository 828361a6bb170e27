"""A quantised base in a Trainer, which takes one only where it knows that an adapter is on it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tether.errors import ConfigError
from tether.handle import handles

_FLAG = "_hf_peft_config_loaded"


@contextmanager
def allow_quantized(model: nn.Module) -> Iterator[None]:
    """Tell transformers within the block that a quantised model carries a trainable adapter.

    `Trainer.__init__` refuses a quantised model unless peft wrapped it or the model's flag
    `_hf_peft_config_loaded` is set. Its reason is met by an adapter of tether's too: what is
    trained is not quantised. So the flag is set while the Trainer is made, and no longer: later it
    would tell `save_pretrained` that peft's adapters are on the model. What else the Trainer asks
    of a quantised model is asked here. Any other model is left alone.

    Args:
        model: quantised or not.

    Yields:
        nothing; the flag is as it was afterwards.

    Raises:
        ConfigError: the model has no trainable adapter, is compiled, or is quantised in a way
            through which gradients do not pass.
    """
    if not getattr(model, "is_quantized", False) or getattr(model, _FLAG, False):
        yield
        return
    _check(model)
    setattr(model, _FLAG, True)
    try:
        yield
    finally:
        vars(model).pop(_FLAG, None)


def _check(model: nn.Module) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    kind = getattr(config, "quant_method", type(quantizer).__name__)
    if not any(handle.record.trainable for handle in handles(model).values()):
        raise ConfigError(
            "the model is quantised and has no trainable adapter: there is nothing to train. "
            "Attach one first, with tether.attach."
        )
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "the model is quantised and compiled, which transformers does not train. Give the "
            "model that you compiled."
        )
    if not getattr(quantizer, "is_trainable", False):
        raise ConfigError(
            f"transformers passes no gradients through {kind}. Load the base in another "
            "quantisation, such as bitsandbytes nf4, or in bfloat16."
        )
