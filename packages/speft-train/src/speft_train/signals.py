"""Ctrl-C and SIGTERM: outside training they end the run at once; while training the step is finished and saved first.

A second signal ends it at once in any case.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


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

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.deferred and self.signum is None:
            self.signum = signum
            return
        raise Stopped(signum, "interrupted")

    @contextmanager
    def deferring(self) -> Iterator[StopRequest]:
        """Within it the first signal is only noted."""
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
