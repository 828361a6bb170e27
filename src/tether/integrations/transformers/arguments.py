"""Arguments of a Trainer, by name, however they were given."""

import inspect
from typing import Any


class Arguments:
    """What a Trainer was called with; to be read and changed before it is made."""

    def __init__(self, cls: type, init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bind them.

        Args:
            cls: of the Trainer.
            init: its `__init__`, bound.
            args: positional ones.
            kwargs: named ones.
        """
        self.cls = cls
        self.signature = inspect.signature(init)
        self.bound = self.signature.bind_partial(*args, **kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional ones."""
        return self.bound.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Named ones."""
        return self.bound.kwargs

    def get(self, name: str) -> Any:
        """Read one.

        Args:
            name: of the argument.

        Returns:
            its value; None where it was not given.
        """
        return self.bound.arguments.get(name, self.bound.kwargs.get(name))

    def set(self, name: str, value: Any) -> None:
        """Give one another value.

        Args:
            name: of the argument.
            value: from now on.
        """
        if name in self.signature.parameters:
            self.bound.arguments[name] = value
        else:
            rest = next(
                p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD
            )
            self.bound.arguments.setdefault(rest, {})[name] = value

    def takes(self, name: str) -> bool:
        """Whether there is such an argument.

        Args:
            name: of the argument.

        Returns:
            True if the Trainer, or one that it is derived from, has it.
        """
        inits = (vars(cls).get("__init__") for cls in self.cls.__mro__)
        return any(name in inspect.signature(init).parameters for init in inits if init)
