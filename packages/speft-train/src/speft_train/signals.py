"""Ctrl-C and SIGTERM: outside training they end the run at once; while training the step is finished and saved first.

One signal is enough. Those that follow it change nothing until the process ends, since a launcher answers Ctrl-C, which the
whole process group gets, by sending SIGTERM to its ranks, one after the other, and each may take its time. Only a second
Ctrl-C ends the run without waiting. (The launcher ends ranks that take too long with SIGKILL.)
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)
SAME_KEYSTROKE = 1.0  # seconds in which a second SIGINT is taken for the first, delivered twice


class Stopped(BaseException):
    """A signal ended the run. The message says what was saved; `exit_code` is 130 for Ctrl-C and 143 for SIGTERM.

    `by_all`: every rank leaves with it, so that one may speak for all. Not an Exception, as KeyboardInterrupt is none: no
    library's `except Exception` may go on after it.
    """

    def __init__(self, signum: int, message: str, by_all: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
        self.by_all = by_all


class StopRequest:
    """Which signal has asked this run to stop, if any."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._since = 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is None:
            self.note(signum)
            if not self.deferred:
                raise Stopped(signum, "interrupted")
        elif signum == signal.SIGINT and time.monotonic() - self._since > SAME_KEYSTROKE:
            raise Stopped(signum, "interrupted a second time, so nothing more was finished or saved")

    def note(self, signum: int) -> None:
        """Take this signal for the one that stops the run: it came to this rank, or to another one first."""
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()

    @contextmanager
    def deferring(self) -> Iterator[StopRequest]:
        """Within it a signal is only noted."""
        self.deferred = True
        try:
            yield self
        finally:
            self.deferred = False


@contextmanager
def handled() -> Iterator[StopRequest]:
    """Install the handlers, and put the former ones back. Within another `handled` it is that one's request, to the end."""
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, StopRequest):
        yield outer
        return
    request = StopRequest()
    former = {signum: signal.signal(signum, request) for signum in HANDLED}
    try:
        yield request
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
