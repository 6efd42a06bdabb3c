"""What the documentation says, taken apart: its pages, code blocks, and the commands that a reader would type."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "packages").glob("*/README.md")])
PROGRAMS = ("speft-train", "speft-hub", "make", "python", "deepspeed", "pip")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)


@dataclass(frozen=True)
class Command:
    """A command of a page, as words without comments and without what stands for more of the same."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def inline(text: str) -> list[str]:
    """The code spans of a page's prose; the table of wrong commands in docs/errors.md is left out."""
    prose = "\n".join(
        line for line in FENCE.sub("", text).splitlines() if not re.match(r"\| `speft-[^|]*\| .* \| \d \|$", line)
    )
    return re.findall(r"`([^`\n]+)`", prose)


def commands() -> list[Command]:
    """Every command of every page, in blocks and in prose."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(text, "bash", "") for line in _lines(block)] + inline(text)
        for line in lines:
            found += [Command(str(page.relative_to(ROOT)), words) for words in _words(line)]
    return found


def _lines(block: str) -> Iterator[str]:
    """The lines of a session: continued ones joined, here-documents left out, variables of the block put in."""
    block = re.sub(r"<<'END'[^\n]*\n.*?^END$", "", block.replace("\\\n", " "), flags=re.S | re.M)
    known: dict[str, str] = {}
    for line in block.splitlines():
        if given := re.fullmatch(r'(\w+)="(.*)"', line):
            known[given[1]] = given[2]
            continue
        for name, value in known.items():
            line = line.replace(f"${name} ", f"{value} ")
        yield line


def _words(line: str) -> Iterator[tuple[str, ...]]:
    """The commands on a line. `[x ...]` is x; two spaces behind a command begin a remark, as # does."""
    for part in re.split(r" && | \| ", re.sub(r"(?<=\S)(  +| # ).*", "", line.strip())):
        if not re.match(rf"({'|'.join(PROGRAMS)})( |$)", part):
            continue
        words = [w.strip("[]") if "=[" not in w and "]'" not in w else w for w in shlex.split(part)]
        yield tuple(w for w in words if w not in ("...", ""))
