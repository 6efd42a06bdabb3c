"""speft-hub: publish, fetch, check, combine and export sparse adapters. The commands are in cli_publish.py and cli_make.py."""

from __future__ import annotations

import sys

from . import cli_make, cli_publish
from .cli_options import app
from .console import run

__all__ = ["app", "cli_make", "cli_publish", "main"]


def main() -> None:
    """The console script."""
    sys.exit(run(app))
