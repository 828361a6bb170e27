"""The folder of a training run as values: of `tether train`, or of transformers' Trainer and TRL.

Logs are data of others: types and sizes are checked, and what is no number is left out.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tether import formats
from tether.errors import ConfigError, HeaderError
from tether.report.values import DriftPoint, RunValues, SiteStats, drift_of, site_stats
from tether.training import log
from tether.value import Adapter, Progress

ADAPTER = "adapter.safetensors"
PAGE = "report.html"
STATE = "trainer_state.json"
_MOST_CHECKPOINTS = 20  # measured of one run, evenly chosen
_LARGEST = 64 * 2**20  # bytes of a log
# What a log calls it -> what the page calls it.
_CURVES = {
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "eval_loss": "held-out loss",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "grad_norm": "gradient norm",
    "seconds_per_step": "seconds per step",
}
# In the logs of a Trainer, and in tether's own.
_DRIFT, _RANK = ("tether/drift", "drift"), ("tether/effective_rank", "effective_rank")
_SETTINGS = (
    "model",
    "data",
    "learning_rate",
    "batch_size",
    "accumulation",
    "block",
    "weight_decay",
    "dtype",
    "seed",
)
_LORA = ("rank", "alpha", "use_rslora", "use_dora")

Curves = Mapping[str, tuple[tuple[int, float], ...]]


def adapter_of(run: Path) -> Adapter:
    """The adapter that a run ended with.

    Args:
        run: its folder.

    Returns:
        the adapter.

    Raises:
        ConfigError: the folder holds none.
        FormatError: it is damaged.
    """
    if (run / ADAPTER).exists():
        return formats.load(run / ADAPTER)
    steps = _checkpoints(run)
    if not steps:
        raise ConfigError(
            f"{run}: holds neither {ADAPTER} nor checkpoint-N/{ADAPTER}. Give the folder of a run "
            "of tether train, or the output_dir of a Trainer that tether adapted."
        )
    return formats.load(steps[max(steps)] / ADAPTER)


def read(run: Path, adapter: Adapter, progress: Progress | None = None) -> RunValues:
    """Read what a run left, and measure its adapter.

    Args:
        run: its folder.
        adapter: of its end, as of `adapter_of`.
        progress: called after each site.

    Returns:
        the values; without those of the base.

    Raises:
        FormatError: a file is damaged.
        NonFiniteError: the adapter holds NaN or Inf.
    """
    sites = site_stats(adapter, progress)
    own = (run / log.RUN).exists()
    entries = list(_own_log(run) if own else _trainer_log(run))
    record = log.read_record(run) if own else {}
    curves = _curves(entries)
    base = record.get("held_out_loss", {}).get("base")
    if base is not None:
        curves["held-out loss"] = ((0, base), *curves.get("held-out loss", ()))
    return RunValues(
        name=run.resolve().name,
        facts=_facts(record, adapter, sites),
        curves=curves,
        drift=tuple(_drift(run, entries, adapter, sites)),
        sites=tuple(sites),
        sizes=_sizes(run),
    )


def _own_log(run: Path) -> Iterator[dict[str, Any]]:
    path = run / log.METRICS
    for line in _text(path).splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return  # the process was killed while it wrote this line
        if isinstance(entry, dict):
            yield entry


def _trainer_log(run: Path) -> Iterator[dict[str, Any]]:
    steps = _checkpoints(run)
    found = [run / STATE, *(steps[step] / STATE for step in sorted(steps, reverse=True))]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        return
    try:
        state = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: not valid JSON: {error}. Copy it again.") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    yield from (e for e in history if isinstance(e, dict)) if isinstance(history, list) else ()


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise HeaderError(f"{path}: is no file of at most {_LARGEST} bytes. Copy it again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: not valid UTF-8: {error}. Copy it again.") from error


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _first_number(entry: dict[str, Any], names: tuple[str, ...]) -> float | None:
    found = (_number(entry.get(name)) for name in names)
    return next((number for number in found if number is not None), None)


def _step(entry: dict[str, Any]) -> int | None:
    step = entry.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else None


def _curves(entries: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Each curve by ascending steps; of several values of one step the last counts."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        step = _step(entry)
        for key, name in _CURVES.items():
            value = _number(entry.get(key))
            if step is not None and value is not None:
                found.setdefault(name, {})[step] = value
    return {name: tuple(sorted(points.items())) for name, points in found.items()}


def _drift(
    run: Path, entries: list[dict[str, Any]], adapter: Adapter, sites: list[SiteStats]
) -> list[DriftPoint]:
    """From the log, else from the checkpoints; with the start of an anchored adapter, and the end.

    An adapter without anchors may have begun anywhere: its start is not known.
    """
    found = {}
    for entry in entries:
        step, rank = _step(entry), _first_number(entry, _RANK)
        if step is not None and rank is not None:
            found[step] = DriftPoint(step, _first_number(entry, _DRIFT), rank)
    steps = _checkpoints(run)
    if not found:
        for step in _spread(sorted(steps)):
            found[step] = drift_of(step, site_stats(formats.load(steps[step] / ADAPTER)))
    last = (
        adapter.provenance.steps if adapter.provenance.steps is not None else max(steps, default=0)
    )
    end = drift_of(last, sites)
    found[last] = end
    if adapter.anchored:
        found.setdefault(0, DriftPoint(0, None if end.relative is None else 0.0, 0.0))
    return [found[step] for step in sorted(found)]


def _spread(steps: list[int]) -> list[int]:
    if len(steps) <= _MOST_CHECKPOINTS:
        return steps
    stride = (len(steps) - 1) / (_MOST_CHECKPOINTS - 1)
    return [steps[round(place * stride)] for place in range(_MOST_CHECKPOINTS)]


def _checkpoints(run: Path) -> dict[int, Path]:
    """Step -> checkpoint with an adapter."""
    found = {}
    for path in run.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if (
            number.isascii()
            and number.isdigit()
            and len(number) < 16
            and (path / ADAPTER).is_file()
        ):
            found[int(number)] = path
    return found


def _sizes(run: Path) -> dict[str, int]:
    """Bytes of each file or folder of the run, but of the page itself."""
    sizes = {}
    for path in sorted(run.iterdir()):
        files = path.rglob("*") if path.is_dir() else (path,)
        size = sum(file.stat().st_size for file in files if file.is_file())
        if path.name != PAGE and not path.name.startswith(".") and size:
            sizes[path.name] = size
    return sizes


def _facts(record: dict[str, Any], adapter: Adapter, sites: list[SiteStats]) -> dict[str, str]:
    origin = adapter.provenance
    facts = {
        "status": record.get("status"),
        "steps": record.get("steps_done", origin.steps),
        "base model": origin.base_model,
        "method": origin.method,
        "sites": len(sites),
        "trained parameters": f"{sum(s.rank * sum(s.shape) for s in sites):,}",
        "learning rate": origin.learning_rate,
        "seed": origin.seed,
    }
    settings = record.get("settings", {})
    facts |= {name.replace("_", " "): settings.get(name) for name in _SETTINGS}
    facts |= {name.replace("_", " "): adapter.config.get(name) for name in _LORA}
    versions = record.get("versions")
    for name, value in versions.items() if isinstance(versions, dict) else ():
        facts[f"{name} version"] = value
    facts["device"] = record.get("device")
    return {n: _shown(v) for n, v in facts.items() if v is not None and v != ""}


def _shown(value: Any) -> str:
    """A setting as text; of a place on this machine its last part: pages are passed on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return json.dumps(value)
