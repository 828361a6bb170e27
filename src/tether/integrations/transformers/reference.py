"""The reference model of preference training: the live model without its adapters, no copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tether.integrations.transformers.arguments import Arguments
from tether.switch import quiet, reference
from tether.value import CHILD


class Reference(nn.Module):
    """Stands where TRL expects a reference model, and computes with the live one.

    Each call is made within `tether.reference`, in eval mode and without gradients: bitwise the
    base, however far the adapter has been trained. It owns no parameter, so moving, freezing or
    preparing it changes nothing; what else is asked of it, the live model answers.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the model, without becoming its parent.

        Args:
            model: with adapters attached.
        """
        super().__init__()
        self._live = (model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives for these inputs.

        Not `forward`, which TRL replaces by one of its own: the live model has that one already.

        Args:
            *args: positional inputs of the model.
            **kwargs: its named inputs.

        Returns:
            the model's output.
        """
        (model,) = self._live
        with quiet(model), reference(model):
            return model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever a stand-in does not have itself, such as `config`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_live" not in vars(self):
                raise
            return getattr(self._live[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling it.

        Args:
            *args: positional inputs of the model.
            **kwargs: its named inputs.

        Returns:
            the model's output.
        """
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base's own tensors, by which TRL recognises log-probabilities that it has cached.

        Args:
            *args: as of torch's `state_dict`.
            **kwargs: as of torch's `state_dict`.

        Returns:
            name -> tensor, without those of adapters.
        """
        state = self._live[0].state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if f".{CHILD}." not in f".{name}"}


@contextmanager
def own_reference(given: Arguments, model: nn.Module) -> Iterator[float]:
    """Make a Trainer within the block that loads no reference model.

    Args:
        given: what it is made with; a missing `ref_model` becomes the stand-in.
        model: to be trained.

    Yields:
        the weight of a reference that the Trainer must be given once it is made; 0 for none.
    """
    settings = given.get("args")
    if given.takes("ref_model"):
        if given.get("ref_model") is None:
            given.set("ref_model", Reference(model))
        yield 0.0
        return
    # GRPO and RLOO take no reference model, and load one wherever their beta is not 0. What has a
    # reference has the other setting too: elsewhere a beta means something else.
    beta = float(getattr(settings, "beta", 0.0) or 0.0)
    if not beta or not hasattr(settings, "sync_ref_model"):
        yield 0.0
        return
    settings.beta = 0.0
    try:
        yield beta
    finally:
        settings.beta = beta
