"""save_merged: base + ΔW as a model folder of its own, with about one tensor in memory."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tether import fs
from tether.checkpoint import INDEX, WEIGHTS, Checkpoint
from tether.errors import ConfigError
from tether.fingerprints import check_fingerprint
from tether.linalg import check_finite
from tether.merged import arithmetic, folder, plan
from tether.merged.arithmetic import Change
from tether.stream import TensorWriter
from tether.value import Adapter, Json, LayerAdapter, Progress

__all__ = ["Change", "MergeReport", "save_merged"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `save_merged` wrote.

    Attributes:
        path: of the folder.
        changes: site path, or name of a parameter trained whole -> how much it changed.
        untied: whether the output head, tied to the embedding in the base, is now a tensor of its
            own; config.json then says `tie_word_embeddings: false`.
        size: bytes of all tensors.
        copied: files taken over from the base.
        left_out: files and folders of the base that were not: other forms of its weights.
    """

    path: Path
    changes: Mapping[str, Change]
    untied: bool
    size: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative Frobenius error of all changes taken together."""
        total = sum(change.norm**2 for change in self.changes.values())
        lost = sum((change.norm * change.error) ** 2 for change in self.changes.values())
        return float((lost / total) ** 0.5) if total > 0 else 0.0

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            its fields and the error of all changes.
        """
        return {
            "path": str(self.path),
            "error": self.error,
            "untied": self.untied,
            "size": self.size,
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "changes": {name: asdict(change) for name, change in self.changes.items()},
        }


def save_merged(
    base: Checkpoint | str | os.PathLike[str],
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a model folder whose weights are W + ΔW, tensor by tensor.

    The base is only read. Sums are made in float32 (float64 where W is) and rounded once; tensors
    that the adapter does not change are copied bit for bit. Where embedding and output head are
    one tensor and the adapter changes either, both are written and the config is untied, since an
    adapter on a live model changes one and not the other.

    Args:
        base: folder of the model, safetensors, one file or shards.
        adapter: made on it.
        path: of the folder to write: new, or empty. Built aside and renamed once.
        dtype: of all floating-point tensors: float32, bfloat16, float16; None for each its own.
        verify: check the fingerprint of every adapted base weight against the adapter's.
        progress: called with (tensors written, tensors in all).

    Returns:
        the measured report.

    Raises:
        BaseMismatchError: a base weight is not the one the adapter was made on.
        ShapeMismatchError: a base weight has another shape.
        UnknownNameError: the base lacks a weight that the adapter changes.
        UnsupportedModuleError: the base is quantised, or tied in a way that cannot be untied here.
        NonFiniteError: a value is NaN or Inf, or does not fit `dtype`.
        FormatError: a file of the base is malformed.
        WriteError: it cannot be written; what was there stays.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(map(str, DTYPES))}.")
    source = base if isinstance(base, Checkpoint) else Checkpoint.open(Path(base))
    target = Path(path)
    folder.check_outside(target, source.folder, "base model")
    folder.check_free(target)
    todo = plan.make(source, adapter)
    copied, left_out = folder.beside_weights(source.folder)
    left_out = [name for name in left_out if name not in (*todo.shards, INDEX)]
    work = _Work(source, adapter, todo, dtype, verify, progress)
    settings = {} if dtype is None else folder.with_dtype(source.config, dtype)
    with fs.atomic_directory(target, ()) as temporary:
        for file, names in todo.shards.items():
            work.write_shard(temporary / file, names, source.metadata[file])
        if list(todo.shards) != [WEIGHTS]:
            folder.write_index(temporary, todo.shards, work.size)
        folder.write_beside(source, temporary, copied, {**settings, **todo.config})
    return MergeReport(target, work.changes, todo.untied, work.size, tuple(copied), tuple(left_out))


class _Work:
    """Makes the tensors one at a time, and counts."""

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        todo: plan.Plan,
        dtype: torch.dtype | None,
        verify: bool,
        progress: Progress | None,
    ) -> None:
        self._base, self._edits, self._dtype = base, todo.edits, dtype
        self._prints = adapter.provenance.fingerprints if verify else {}
        self._verify, self._progress = verify, progress
        self._total = sum(map(len, todo.shards.values()))
        self._done = self.size = 0
        self.changes: dict[str, Change] = {}

    def write_shard(self, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]) -> None:
        """Write one file."""
        # Sorted: safetensors gives them in any order, and the same merge is the same bytes.
        kept = dict(sorted({"format": "pt", **metadata}.items()))
        shapes = {name: self._base.shape(self._source(name)) for name in names}
        specs = {name: (self._dtype_of(name), shape) for name, shape in shapes.items()}
        with TensorWriter(path, specs, len(json.dumps(kept))) as writer:
            for name in names:
                tensor = self._make(name)
                writer.write(name, tensor)
                self.size += tensor.nbytes
                del tensor  # before the next one is read
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            writer.finish(kept)

    def _make(self, name: str) -> Tensor:
        edit, dtype = self._edits.get(name), self._dtype_of(name)
        tensor = self._base.tensor(self._source(name))
        if edit is None or edit.change is None:
            if tensor.dtype != dtype:
                tensor = tensor.to(dtype)
                check_finite(tensor, f"{name!r} in {dtype}")
            return tensor
        if isinstance(edit.change, LayerAdapter) and edit.path in self._prints:
            check_fingerprint(edit.path, tensor, self._prints[edit.path])
        result, change = arithmetic.add(tensor, edit.change, dtype, name, self._verify)
        self.changes[edit.path] = change
        return result

    def _source(self, name: str) -> str:
        return self._edits[name].source if name in self._edits else name

    def _dtype_of(self, name: str) -> torch.dtype:
        own = self._base.dtype(self._source(name))
        return self._dtype if self._dtype is not None and own.is_floating_point else own
