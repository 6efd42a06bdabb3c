"""How many calls of one module a thread is in, read off its stack.

PyTorch calls no hook when a forward ends by Ctrl-C (KeyboardInterrupt) or SystemExit: who counts by hooks alone takes it for one
that is still in progress.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__
_RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Life:
    """What a thread alone holds, and loses with its end."""


_OWN = threading.local()


def life() -> weakref.ref[Life]:
    """Dead once the thread that asked has ended. Its number does not tell: the next thread may be given it."""
    if not hasattr(_OWN, "life"):
        _OWN.life = Life()
    return weakref.ref(_OWN.life)


def depth(module: nn.Module, thread: int) -> int | None:
    """How many calls of `module` the thread of this number is in; None when that cannot be seen.

    A thread that runs on meanwhile cannot be: its stack is read from the top down. Nor can it from compiled code, and a call that
    was compiled may not be found.
    """
    if torch.compiler.is_compiling():
        return None
    top = frame = sys._current_frames().get(thread)
    try:
        if top is None or top.f_code.co_flags & _RESUMED:  # it may have been taken up again elsewhere
            return None
        found = 0
        while frame is not None:
            found += frame.f_code is _CALL and frame.f_locals.get("self") is module
            frame = frame.f_back
        return found if sys._current_frames().get(thread) is top else None
    finally:
        del top, frame  # one's own would hold itself, and all that its callers hold
