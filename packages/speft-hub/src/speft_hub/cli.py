"""speft-hub: publish, fetch, check, combine and export sparse adapters. The commands are in cli_publish.py and cli_make.py."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli_options import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    commands = _commands()  # PyTorch takes seconds
    from .console import run

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(commands))


def _leave(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C while modules are loaded: nothing has begun, and an exception could be lost in whatever is being loaded."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def _commands() -> Any:
    from . import cli_make, cli_publish  # noqa: F401 - they register their commands
    from .cli_options import app

    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return _commands()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
