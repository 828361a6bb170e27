"""Train, be killed at one step of writing to the disk, and go on; run as a program.

Prints what is wrong, a line each, and then how often it was killed: no line before that if every
kill left complete checkpoints only, and the resumed run ended, bit for bit, as the uninterrupted.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from trainer_runs import STATE, equal, make_trainer
from transformers.trainer_utils import get_last_checkpoint

import tether
from tether.integrations.transformers import ADAPTER_FILE, ExportLora

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
LAST = "checkpoint-3"
LORA = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def train(out: Path, resume: bool) -> None:
    """Three steps, saved after each; the newest stays."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tether.attach(model, tether.LoraConfig(init="olora", rank=2, dropout=0.1))
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "logging_strategy": "no"}
    trainer = make_trainer(model, out, [ExportLora(at_end=False)], **settings)
    trainer.train(resume_from_checkpoint=resume)


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  it must not return into the parent's code
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def watch(out: Path, seen: Callable[[str], None]) -> None:
    """Call `seen` before every change of a file or folder of the run, from now on."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(out)):
            if event == "open" and not set("wax+") & set(str(arguments[1])):
                return
            seen(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def moments(out: Path) -> list[str]:
    """Every step of writing of an uninterrupted run."""
    log = out.with_suffix(".events")
    with open(log, "w", encoding="utf-8") as file:

        def work() -> None:
            watch(out, lambda event: print(event, file=file, flush=True))
            train(out, False)

        assert in_child(work) == 0
    return log.read_text("utf-8").splitlines()


def killed(out: Path, at: int) -> bool:
    """Train until the step of writing of that number; whether it was killed there."""
    count = 0

    def seen(_: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        watch(out, seen)
        train(out, False)

    return os.WTERMSIG(in_child(work)) == signal.SIGKILL


def faults(out: Path) -> Iterator[str]:
    """What is wrong with the checkpoints of a run."""
    for folder in out.glob("checkpoint-*"):
        missing = {*STATE, ADAPTER_FILE, "lora"} - {path.name for path in folder.iterdir()}
        if missing:
            yield f"{folder.name} lacks {sorted(missing)}"
            continue
        tether.load(folder / ADAPTER_FILE)
        tether.load(folder / "lora")
        if {path.name for path in (folder / "lora").iterdir()} != LORA:
            yield f"{folder.name}/lora is not complete"
        for name in STATE[:3]:
            torch.load(folder / name, weights_only=False)
        json.loads((folder / STATE[3]).read_text("utf-8"))


def chosen(events: list[str], every: int) -> list[int]:
    """Where to kill: wherever a checkpoint gets or loses its name, and at every so manyth step.

    Not in the last save, whose remains no later one clears away.
    """
    last = next(n for n, event in enumerate(events) if LAST in event)
    before = events[:last]
    names = [
        n
        for n, event in enumerate(before, 1)
        if event.startswith(("os.rename", "shutil.rmtree")) and "checkpoint-" in Path(event).name
    ]
    return sorted({*names, *range(1, last, every)})


def main(out: Path, every: int) -> None:
    """Kill a run at one moment after the other, and let each go on."""
    whole, run = out / "whole", out / "killed"
    events = moments(whole)
    wanted = tether.load(whole / LAST / ADAPTER_FILE)
    for at in chosen(events, every):
        where = f"{at}, {events[at - 1]}"
        shutil.rmtree(run, ignore_errors=True)
        if not killed(run, at):
            print(f"{where}: was not killed")
        for fault in faults(run):
            print(f"{where}: {fault}")
        begun = run.is_dir() and get_last_checkpoint(str(run)) is not None
        if in_child(lambda: train(run, begun)) != 0:  # noqa: B023  it is called here
            print(f"{where}: does not go on")
        elif not equal(tether.load(run / LAST / ADAPTER_FILE), wanted):
            print(f"{where}: ends elsewhere")
        left = {path.name for path in run.iterdir()} - {LAST}
        if left:
            print(f"{where}: left {sorted(left)}")
    print(f"killed at {len(chosen(events, every))} of {len(events)} moments")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
