"""Ctrl-C and SIGTERM: outside training they end the run at once; while training the step is finished and saved first.

A second Ctrl-C ends it at once. A second SIGTERM does not: a launcher answers Ctrl-C, which the whole process group gets, by
sending SIGTERM to its ranks, and ends them with SIGKILL when they take too long.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)
SAME_KEYSTROKE = 1.0  # seconds in which a second SIGINT is taken for the first, delivered twice


class Stopped(Exception):
    """A signal ended the run. The message says what was saved; `exit_code` is 130 for Ctrl-C and 143 for SIGTERM."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Which signal has asked the training loop to stop, if any."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._since = 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if not self.deferred:
            raise Stopped(signum, "interrupted")
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._since > SAME_KEYSTROKE:
            raise Stopped(signum, "interrupted a second time; the step is not finished and nothing was saved")

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
    """Install the handlers, and put the former ones back."""
    request = StopRequest()
    former = {signum: signal.signal(signum, request) for signum in HANDLED}
    try:
        yield request
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
