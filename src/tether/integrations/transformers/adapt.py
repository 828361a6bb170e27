"""adapt: a Trainer class that trains an adapter of tether's."""

import functools

from transformers import Trainer

from tether.errors import ConfigError
from tether.integrations.transformers.trainer import AdapterTrainer


@functools.cache
def adapt(trainer_class: type) -> type:
    """The same Trainer, for a model with an adapter attached.

        trainer = adapt(SFTTrainer)(model=model, args=args, train_dataset=data)

    Arguments, methods and callbacks are those of the class given. Checkpoints hold the adapter
    instead of the base, are complete or absent, and resume bit for bit; preference training without
    a `ref_model` compares with the base, without a copy of it. See `AdapterTrainer`.

    Args:
        trainer_class: transformers' `Trainer` or any class derived from it, such as TRL's.

    Returns:
        a subclass, the same one each time; an adapted class itself.

    Raises:
        ConfigError: it is no Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise ConfigError(
            f"{trainer_class!r} is no Trainer class. Give transformers.Trainer, or one derived "
            "from it, such as trl.SFTTrainer; the class, not an instance."
        )
    if issubclass(trainer_class, AdapterTrainer):
        return trainer_class
    text = f"{trainer_class.__name__} for a model with an adapter of tether's."
    body = {"__doc__": text, "__module__": AdapterTrainer.__module__}
    return type(f"Adapted{trainer_class.__name__}", (AdapterTrainer, trainer_class), body)
