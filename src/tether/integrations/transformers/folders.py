"""The folders of a run: a checkpoint is built aside, and complete under its own name or absent."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from tether import fs
from tether.errors import DistributedError, HeaderError
from tether.formats import container, load
from tether.value import Adapter

ADAPTER_FILE = "adapter.safetensors"
LORA_FOLDER = "lora"
RANKS_FILE = "ranks.json"
_MAX_RANKS_FILE = 1000  # characters
# No checkpoint to the Trainer, which looks for "checkpoint-N" in the folder of the run.
UNFINISHED = ".tether-unfinished"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")


def last_adapter(output_dir: str | Path) -> Adapter | None:
    """The adapter of a run's newest checkpoint, so that going on needs no decomposition.

        tether.attach(model, last_adapter("run") or tether.LoraConfig(init="pissa"))

    Args:
        output_dir: of the run.

    Returns:
        the adapter, or None where the folder is missing or has no checkpoint.

    Raises:
        FormatError: the newest checkpoint has no adapter, or a damaged one.
    """
    newest = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    return None if newest is None else load(Path(newest) / ADAPTER_FILE)


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint.

    Args:
        step: optimizer steps done.

    Returns:
        "checkpoint-N".
    """
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def clear(run: Path) -> None:
    """Remove what a killed save or removal left behind.

    Args:
        run: folder of the run.
    """
    fs.discard_directory(run / UNFINISHED, run / UNFINISHED)


def write_ranks(folder: Path, size: int) -> None:
    """Note how many processes a checkpoint is of.

    Args:
        folder: of the checkpoint, while it is built.
        size: how many.
    """
    fs.write_text(folder / RANKS_FILE, json.dumps({"world_size": size}))


def check_ranks(folder: Path, size: int) -> None:
    """Raise for a checkpoint of another number of processes.

    The Trainer would go on: with batches dealt out otherwise, and where a random state is missing
    with whatever state there is.

    Args:
        folder: of the checkpoint.
        size: how many processes there are here.

    Raises:
        DistributedError: it is of more, or of fewer.
        HeaderError: its note is malformed.
    """
    path = folder / RANKS_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        text = file.read(_MAX_RANKS_FILE + 1).decode(errors="replace")
    note = container.parse_json(text, str(path), _MAX_RANKS_FILE)
    before = note.get("world_size") if isinstance(note, dict) else None
    if type(before) is not int or before < 1:
        raise HeaderError(f"{path}: has no number 'world_size', at least 1. {container.DAMAGED}")
    if before != size:
        raise DistributedError(
            f"{folder}: is a checkpoint of {before} process{'es' if before > 1 else ''}, and here "
            f"{f'are {size}' if size > 1 else 'is 1'}: batches would be dealt out otherwise, and "
            "random states would be missing, so it would not be the same run. Start "
            f"{before} (--nproc-per-node {before}); or begin a new run from its adapter: "
            f"tether.attach(model, tether.load({str(folder / ADAPTER_FILE)!r})), with another "
            "output_dir and without resume_from_checkpoint."
        )


def publish(run: Path, name: str) -> None:
    """Give a checkpoint that was built aside its own name.

    Args:
        run: folder of the run.
        name: of the checkpoint.

    Raises:
        WriteError: it cannot be renamed; an older one of the name is as it was.
    """
    fs.publish_directory(run / UNFINISHED / name, run / name)
    fs.remove_empty(run / UNFINISHED)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, but neither the newest nor the best.

    The Trainer's own rotation removes file by file: killed then, it leaves a damaged checkpoint.

    Args:
        run: folder of the run.
        limit: how many to keep; None or 0 for all.
        best: path of the best one, if there is one.
    """
    found = checkpoints(run)
    if not limit or limit < 0 or len(found) <= limit:
        return
    kept = {found[-1]} | ({Path(best).resolve()} if best else set())
    older = [path for path in found if path not in kept]
    keep_only(run, kept | set(older[max(0, len(found) - max(limit, len(kept))) :]))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, and no folder whose name only begins like theirs.

    Args:
        run: folder of the run.

    Returns:
        absolute paths, oldest first.
    """
    found = [Path(path) for path in sort_checkpoints(str(run.resolve()), use_mtime=True)]
    return [path for path in found if _NAME.fullmatch(path.name)]


def keep_only(run: Path, kept: set[Path]) -> None:
    """Remove every checkpoint but some.

    Args:
        run: folder of the run.
        kept: absolute paths of the ones to keep.
    """
    for path in checkpoints(run):
        if path not in kept:
            fs.discard_directory(path, run / UNFINISHED / path.name)
    fs.remove_empty(run / UNFINISHED)
