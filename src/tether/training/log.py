"""What a run leaves to read: run.json, its settings and results; metrics.jsonl, step by step."""

import json
from pathlib import Path
from typing import Any

from tether import fs
from tether.drift import Drift
from tether.errors import ConfigError, HeaderError
from tether.formats import container
from tether.training.loop import Step
from tether.training.settings import Settings

METRICS, RUN = "metrics.jsonl", "run.json"


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write run.json.

    Args:
        out: folder of the run.
        record: JSON values.
    """
    fs.write_text(out / RUN, json.dumps(record, indent=2) + "\n")


def read_record(out: Path) -> dict[str, Any]:
    """Read run.json.

    Args:
        out: folder of the run.

    Returns:
        its fields; those that a run is resumed by are there and of the right types.

    Raises:
        ConfigError: there is none.
        HeaderError: it is damaged.
    """
    path = out / RUN
    if not path.exists():
        raise ConfigError(f"{out}: there is no run to go on with ({RUN} is missing).")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: not valid UTF-8: {error}.") from error
    record = container.parse_json(text, str(path))
    wanted = {"settings": dict, "held_out_loss": dict, "data_sha256": str, "held_out_sha256": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in wanted.items()
    ):
        raise HeaderError(f"{path}: not the record of a run; it needs {', '.join(wanted)}.")
    losses = record["held_out_loss"]
    assert isinstance(losses, dict)
    if not all(type(loss) is float for loss in losses.values()):
        raise HeaderError(f"{path}: held_out_loss must hold numbers, not {losses!r}.")
    return record


def settings_of(out: Path, record: dict[str, Any]) -> Settings:
    """The settings of a run.

    Args:
        out: folder of the run.
        record: as of `read_record`.

    Returns:
        the settings.

    Raises:
        HeaderError: they are damaged.
    """
    try:
        return Settings.from_dict(record["settings"])
    except (ConfigError, TypeError, AttributeError) as error:
        raise HeaderError(f"{out / RUN}: settings: {error}") from error


def append_step(out: Path, step: Step, seconds: float) -> None:
    """Log one optimizer step.

    Args:
        out: folder of the run.
        step: what it did.
        seconds: per step, so far.
    """
    record = {
        "step": step.number,
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "tokens": step.tokens,
        "seconds_per_step": round(seconds, 4),
    }
    fs.append_line(out / METRICS, json.dumps(record))


def append_evaluation(out: Path, step: int, loss: float) -> None:
    """Log a held-out loss, unless the log has that of the same step.

    Args:
        out: folder of the run.
        step: steps done.
        loss: held out.
    """
    _append_once(out, "held_out_loss", {"step": step, "held_out_loss": loss})


def append_drift(out: Path, step: int, drift: Drift) -> None:
    """Log how far the weights have moved, unless the log has that of the same step.

    Args:
        out: folder of the run.
        step: steps done.
        drift: of the adapter.
    """
    record = {"step": step, "drift": drift.relative, "effective_rank": drift.effective_rank}
    _append_once(out, "drift", record)


def _append_once(out: Path, key: str, record: dict[str, Any]) -> None:
    """A run may be gone on with at any point: what is logged beside a step is among the last."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    last = (json.loads(line) for line in lines[-2:])
    if not any(key in entry and entry.get("step") == record["step"] for entry in last):
        fs.append_line(path, json.dumps(record))


def cut_metrics(out: Path, step: int) -> None:
    """Drop what was logged after a checkpoint: those steps are run again.

    Args:
        out: folder of the run.
        step: of the checkpoint.
    """
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            done = json.loads(line)["step"]
        except ValueError:
            break  # the process was killed while it wrote this line
        if done <= step:
            kept.append(line + "\n")
    fs.write_text(path, "".join(kept))
