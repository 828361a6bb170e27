"""`tether cache`: the anchors that are kept, so that none is computed twice."""

import dataclasses
import re
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tether import cache
from tether.cli.console import Bars, DebugOption, JsonOption, guarded, out, print_json
from tether.errors import ConfigError

NAME = "cache"
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**n for n, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-z]*)")

app = typer.Typer(no_args_is_help=True, help="Look after the anchors that are kept for reuse.")


@app.command("info")
def info(json_: JsonOption = False, debug: DebugOption = False) -> None:
    """Print where anchors are kept, how many, their size, and when they were last used."""
    with guarded(json_, debug):
        folder, enabled = cache.folder(), cache.enabled()
        found = cache.info(folder)
        times = {"oldest": _time(found.oldest), "newest": _time(found.newest)}
        if json_:
            values = {"folder": str(folder), "enabled": enabled}
            print_json(values | dataclasses.asdict(found) | times)
            return
        table = Table("", Column("", overflow="fold"), show_header=False)
        table.add_row("folder", str(folder))
        table.add_row("anchors", f"{found.entries:,}")
        table.add_row("size", size_text(found.bytes))
        if found.entries:
            table.add_row("last used", f"{times['newest']}, the oldest {times['oldest']}")
        out.print(table)
        if enabled:
            out.print("TETHER_NO_CACHE=1 switches the cache off, TETHER_CACHE moves it.")
        else:
            out.print("Switched off: TETHER_NO_CACHE is set.")


@app.command("verify")
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Remove the damaged ones.")] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every anchor that is kept and check it; exit code 1 if a damaged one is left.

    Damaged anchors do no harm: they are found out when read, and computed again.
    """
    with guarded(json_, debug):
        folder = cache.folder()
        with Bars(quiet=json_).task("Checking anchors") as task:
            found = cache.verify(folder, remove, progress=task)
        left = sum(not bad.removed for bad in found.bad)
        if json_:
            bad = [dataclasses.asdict(item) | {"path": str(item.path)} for item in found.bad]
            print_json({"folder": str(folder), "checked": found.checked, "bad": bad, "left": left})
        else:
            _show_verified(str(folder), found, left)
        if left:
            raise typer.Exit(1)


@app.command("prune")
def prune(
    max_size: Annotated[
        str, typer.Option("--max-size", help="What may stay: 2GB, 500MB, 1.5GiB; 0 for nothing.")
    ],
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove anchors, the least recently used first, until the rest is small enough."""
    with guarded(json_, debug):
        limit, folder = parse_size(max_size), cache.folder()
        with Bars(quiet=json_).task("Removing anchors") as task:
            done = cache.prune(folder, limit, progress=task)
        if json_:
            print_json({"folder": str(folder), "max_size": limit} | dataclasses.asdict(done))
        else:
            for reason in done.failed:
                out.print(reason, soft_wrap=True)
            out.print(
                f"removed {_anchors(done.removed)}, {size_text(done.freed)}; "
                f"{_anchors(done.entries)}, {size_text(done.bytes)}, left in {folder}",
                soft_wrap=True,
            )
        if done.failed:
            raise typer.Exit(1)


def parse_size(text: str) -> int:
    """Read a size with its unit.

    Args:
        text: "2GB", "500 MB", "1.5GiB", "0"; kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB
            of 1024; no unit is bytes. Upper and lower case are the same.

    Returns:
        bytes.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(
            f"--max-size {text!r} is not a size. Give a number and a unit, such as 2GB, 500MB, "
            "1.5GiB or 0."
        )
    size: int = round(float(match[1]) * _UNITS[match[2]])
    return size


def size_text(size: int) -> str:
    """A size for people.

    Args:
        size: in bytes.

    Returns:
        "1.2 GB".
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _show_verified(folder: str, found: cache.Verified, left: int) -> None:
    if found.bad:
        table = Table(Column("damaged", overflow="fold"), "removed")
        for bad in found.bad:
            table.add_row(bad.reason, "yes" if bad.removed else "no")
        out.print(table)
    advice = "; --remove removes them" if left else ""
    out.print(
        f"checked {_anchors(found.checked)} in {folder}: {len(found.bad)} damaged, "
        f"{len(found.bad) - left} removed{advice}",
        soft_wrap=True,
    )


def _anchors(number: int) -> str:
    return f"{number:,} anchor" + ("" if number == 1 else "s")


def _time(seconds: float | None) -> Any:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(" ", "seconds")
