"""How the command line speaks: text or JSON on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from speft_core import UserError

from .pulling import Progress as Report

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143

# Typer brings a click of its own in some versions; its public exceptions lead to the right base class in all.
UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def show(record: dict[str, Any] | list[Any], as_json: bool, text: Callable[[], None]) -> None:
    """Print the record as one JSON document, or what `text` prints for people."""
    if as_json:
        print(json.dumps(record, indent=2, default=str))
    else:
        text()


def note(line: str) -> None:
    """One line on stderr that a person should know, although all went well."""
    print(f"note: {line}", file=sys.stderr)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table that fits the terminal; on a pipe, as wide as it needs."""
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    made = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    out.print(made)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report | None]:
    """A bar per file on a terminal's stderr; None where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield report


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, as KeyboardInterrupt is none: nothing may go on after it."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends the work as Ctrl-C does, and nothing half-made stays behind. Another one meanwhile changes nothing."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # it is somebody else's
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(app: Callable[..., Any], arguments: list[str] | None = None) -> int:
    """Run a Typer app and turn what users can cause into one line and an exit code; bugs keep their tracebacks."""
    try:
        with _terminable():
            return _run(app, arguments)
    except Terminated:
        print("interrupted", file=sys.stderr)
        return TERMINATED


def _run(app: Callable[..., Any], arguments: list[str] | None) -> int:
    try:
        result = app(args=arguments, standalone_mode=False, prog_name="speft-hub")
        if result == INTERRUPTED:  # Typer has turned Ctrl-C into this
            print("interrupted", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        if not error.format_message():  # no command at all: the help is the answer
            print(error.ctx.get_help(), file=sys.stderr)
            return int(error.exit_code)
        where = f"; {error.ctx.command_path} --help" if getattr(error, "ctx", None) else ""
        print(f"error: {error.format_message().rstrip('.')}{where}", file=sys.stderr)
        return int(error.exit_code)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # `speft-hub list | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return USER_ERROR
