"""The folders of a run: a checkpoint is built aside, and complete under its own name or absent."""

import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from tether import fs
from tether.formats import load
from tether.value import Adapter

ADAPTER_FILE = "adapter.safetensors"
LORA_FOLDER = "lora"
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
