"""Every error tether raises on purpose: where, what with both values, what to do.

TetherError
|-- ConfigError                  a setting that cannot be meant (also ValueError)
|   |-- UnknownMethodError       `init` names no method
|   |-- UnknownNameError         a pattern, field or adapter name matches nothing
|   |-- NoSiteError              nothing in the model was selected
|   |-- RankTooLargeError        rank > min(out, in) of a site
|   `-- UnsupportedModuleError   a module that cannot carry an adapter
|-- WeightError                  a base weight that cannot be read
|   |-- NonFiniteError           NaN or Inf in it
|   |-- MetaTensorError          it has no values (meta device)
|   |-- ShardedWeightError       it is a DTensor: attach before fully_shard
|   `-- ConvergenceError         its decomposition missed the tolerance asked for
|-- AttachError                  an adapter and a model that do not go together
|   |-- NameTakenError           the model has an adapter of that name
|   |-- DetachedError            the handle's adapter is no longer on the model
|   |-- ShapeMismatchError       a site's shape differs
|   |-- BaseMismatchError        a base weight is not the one the adapter was made on
|   |-- HookNotFiredError        a site's forward was never called
|   |-- RowsError                a batch whose rows cannot be told apart at a site
|   |-- UntrackedError           how a live peft adapter started is not known
|   |-- MergedError              an adapter is merged into the base's weights
|   |-- TiedWeightError          a weight that is another module's too cannot be merged into
|   |-- OffloadedError           the adapter's factors are not on the model
|   `-- VerificationError        a file and the live model give different outputs
|-- FormatError                  a file that is not what it should be
|   |-- NotAnAdapterError        it is no adapter file or folder
|   |-- PickleRefusedError       it is a pickle: reading it can run code
|   |-- TruncatedFileError       it ends too early
|   |-- HeaderError              its header is malformed or too large
|   |-- DigestError              its bytes are not the ones that were written
|   |-- UnsupportedAdapterError  it holds something that tether cannot represent
|   `-- RescueError              what was given does not tell its initial factors
|-- DistributedError             ranks of torch.distributed that do not go together
|-- DataError                    training text that cannot be used
|-- ModelError                   a model that cannot be found or read
|-- MissingExtraError            an optional dependency is not installed
`-- WriteError                   a file or folder could not be written; nothing was replaced
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TetherError(Exception):
    """Base of every error that tether raises on purpose."""


class ConfigError(TetherError, ValueError):
    """A setting that cannot be meant."""


class UnknownMethodError(ConfigError):
    """`init` names no method."""


class UnknownNameError(ConfigError):
    """A pattern, a field or an adapter name matches nothing."""


class NoSiteError(ConfigError):
    """Nothing in the model was selected."""


class RankTooLargeError(ConfigError):
    """The rank exceeds the smaller side of a site's weight."""


class UnsupportedModuleError(ConfigError):
    """A module that cannot carry an adapter."""


class WeightError(TetherError):
    """A base weight that cannot be read."""


class NonFiniteError(WeightError):
    """A tensor holds NaN or Inf."""


class MetaTensorError(WeightError):
    """A weight has no values: it is on the meta device."""


class ShardedWeightError(WeightError):
    """A weight is a DTensor."""


class ConvergenceError(WeightError):
    """A decomposition missed the tolerance asked for."""


class AttachError(TetherError):
    """An adapter and a model that do not go together."""


class NameTakenError(AttachError):
    """The model already has an adapter of that name."""


class DetachedError(AttachError):
    """The handle's adapter is no longer on the model."""


class ShapeMismatchError(AttachError):
    """A site's shape differs from the adapter's."""


class BaseMismatchError(AttachError):
    """A base weight is not the one the adapter was made on."""


class HookNotFiredError(AttachError):
    """A site's forward was never called, so its adapter had no effect."""


class RowsError(AttachError):
    """A batch whose rows cannot be told apart at a site."""


class UntrackedError(AttachError):
    """How a live peft adapter started is not known, and so what training changed."""


class MergedError(AttachError):
    """An adapter is merged into the base's weights."""


class TiedWeightError(AttachError):
    """A weight that is another module's too: merging would change both."""


class OffloadedError(AttachError):
    """The adapter's factors are not on the model; restore them first."""


class VerificationError(AttachError):
    """A file and the live model give outputs that differ by more than the tolerance."""


class FormatError(TetherError):
    """A file that is not what it should be."""


class NotAnAdapterError(FormatError):
    """A path that is no adapter file or folder."""


class PickleRefusedError(FormatError):
    """A pickle: reading it can run code."""


class TruncatedFileError(FormatError):
    """A file that ends too early."""


class HeaderError(FormatError):
    """A header that is malformed or too large."""


class DigestError(FormatError):
    """Bytes that are not the ones that were written."""


class UnsupportedAdapterError(FormatError):
    """An adapter that holds something tether cannot represent."""


class RescueError(FormatError):
    """The files given do not tell an adapter's initial factors, or not surely enough."""


class DistributedError(TetherError):
    """Ranks of torch.distributed that do not go together."""


class DataError(TetherError):
    """Training text that cannot be used."""


class ModelError(TetherError):
    """A model that cannot be found or read."""


class MissingExtraError(TetherError):
    """An optional dependency is not installed."""


class WriteError(TetherError):
    """A file or folder could not be written; nothing was replaced."""


def nearest(name: str, valid: Iterable[str], limit: int = 3) -> str:
    """The valid names closest to `name`, as the end of an error's sentence.

    Args:
        name: what was given.
        valid: what would have been accepted.
        limit: how many names to offer at most.

    Returns:
        `Nearest: 'a', 'b'.`, or the first few valid names where none is near.
    """
    names = sorted(set(valid))
    close = get_close_matches(name, names, n=limit, cutoff=0.5)
    if close:
        return "Nearest: " + ", ".join(map(repr, close)) + "."
    more = ", …" if len(names) > limit * 3 else ""
    return "Valid: " + ", ".join(map(repr, names[: limit * 3])) + more + "."
