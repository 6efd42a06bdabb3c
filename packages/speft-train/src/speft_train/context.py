"""One run while it runs: its config, its processes, its folder, and what has been loaded so far."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .config import RunConfig
from .folder import RunFolder
from .ranks import Ranks
from .signals import StopRequest

if TYPE_CHECKING:
    from .methods import Attached


@dataclass
class Run:
    """What the stages hand to each other. Stages that are skipped leave their part None."""

    cfg: RunConfig
    ranks: Ranks
    folder: RunFolder
    request: StopRequest
    console: Console
    model: Any = None  #: the base model, on its device
    tokenizer: Any = None
    data: Any = None  #: data.DataBundle
    mask: Any = None  #: SparsityMask
    attached: Attached | None = None
    contents: dict[str, str] = field(default_factory=dict)  #: what the files that it reads hold, see contents.py
    todo: list[str] = field(default_factory=list)  #: names of the stages that have to run
    notes: list[str] = field(default_factory=list)  #: lines for the report

    @property
    def shows_progress(self) -> bool:
        """Whether this process draws progress bars."""
        wanted = not self.cfg.train.get("disable_tqdm", False)
        return wanted and self.ranks.is_main and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One line to the user, from rank 0."""
        if self.ranks.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line to the user that the report repeats."""
        self.notes.append(text)
        self.say(text)
