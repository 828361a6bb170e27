"""Run a page of docs/ as its reader would: block after block, in an empty folder."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NEW_PROCESS = "# In a new process\n"
# A block that is a file begins with its name.
_FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
_COMMANDS = {
    "tether": "tether",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: after the opening fence.
        text: between the fences.
        line: of the page, on which `text` begins, from 0.
    """

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in _FENCE.finditer(text)
    ]
    assert text.count("```") == 2 * len(found), f"{page}: a fence is not closed"
    return found


def shape_of(line: str) -> str:
    """A line of output without what differs from run to run: numbers and the width of columns."""
    return re.sub(r"\s+", " ", _NUMBER.sub("#", line)).strip(" ─━")


class Reader:
    """Runs the blocks of one page: python in one scope, commands beside it, texts as checks."""

    def __init__(self, page: Path) -> None:
        self.page, self.scope, self.output = page, {"__name__": "__main__"}, ""

    def read(self) -> dict[str, object]:
        """Run every block; the scope of the python blocks."""
        for block in blocks(self.page):
            getattr(self, f"_{block.language or 'plain'}")(block)
        return self.scope

    def _python(self, block: Block) -> None:
        if _FILE.match(block.text):
            self._yaml(block)
            return
        if block.text.startswith(NEW_PROCESS):
            self.output = self._run(["-c", block.text])
            return
        # Blank lines in front: a traceback names the line of the page.
        code = compile("\n" * block.line + block.text, str(self.page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, self.scope)
        self.output = out.getvalue()

    def _yaml(self, block: Block) -> None:
        """A file, put into the folder."""
        name = _FILE.match(block.text)
        assert name, f"without the name of its file: {block.text[:40]!r}"
        Path(name[1]).write_text(block.text, encoding="utf-8")

    def _console(self, block: Block) -> None:
        self.output = ""
        for line in block.text.replace("\\\n", " ").splitlines():
            prompt, command, *arguments = shlex.split(line, comments=True)
            known = prompt == "$" and command in _COMMANDS
            assert known, f"not a command that is run: {line}"
            self.output += self._run(["-m", _COMMANDS[command], *arguments])

    def _text(self, block: Block) -> None:
        """What a page says is printed has the words of what was; "…" stands for more of it."""
        printed = [shape_of(line) for line in self.output.splitlines()]
        for line in block.text.splitlines():
            assert shape_of(line) in {"…", *printed}, f"not printed: {line!r}\n{self.output}"

    def _run(self, arguments: list[str]) -> str:
        """Run python with these; what it printed."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout
