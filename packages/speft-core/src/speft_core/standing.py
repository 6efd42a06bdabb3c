"""Tensors that take the place of a module's parameters while it computes, also where it computes again in backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

TURN = threading.RLock()  #: held while what stands in changes; garbage collection may come back to it in the same thread
_LINES = "_speft_standing"  # on a module: attribute -> what the instance had, then all that stands in for it, the last in its place
_NOTHING = object()

Within = Callable[[], AbstractContextManager[None]]

#: What a layer of transformers (GradientCheckpointingLayer) gives its forward to.
CHECKPOINTING = "_gradient_checkpointing_func"


class standing_in:
    """Within it the taps take the place of the module's parameters: an attribute of the instance hides a parameter.

    Forwards of several threads may begin and end in any order: who leaves takes only what is its own.
    """

    def __init__(self, module: nn.Module, taps: Mapping[str, Any]) -> None:
        self._instance, self._taps = module.__dict__, taps

    def __enter__(self) -> None:  # plain code: entered for hundreds of layers a step
        instance = self._instance
        with TURN:
            lines = instance.get(_LINES)
            if lines is None:
                lines = instance[_LINES] = {}
            for attribute, tap in self._taps.items():
                line = lines.get(attribute)
                if line is None:
                    line = lines[attribute] = [instance.get(attribute, _NOTHING)]
                line.append(tap)
                instance[attribute] = tap

    def __exit__(self, *_: object) -> None:
        instance = self._instance
        with TURN:
            lines = instance.get(_LINES, {})  # gone where taps are none, and others have come and left
            for attribute, tap in self._taps.items():
                line = lines[attribute]
                del line[next(place for place, other in enumerate(line) if other is tap) if line[-1] is not tap else -1]
                if line[-1] is _NOTHING:
                    del instance[attribute]
                else:
                    instance[attribute] = line[-1]
                if len(line) == 1:
                    del lines[attribute]
            if not lines:
                instance.pop(_LINES, None)


@contextmanager
def traced_in(module: nn.Module, taps: Mapping[str, Any]) -> Iterator[None]:
    """As standing_in, for code that torch.compile traces, which knows no locks."""
    instance = module.__dict__
    before = {attribute: instance[attribute] for attribute in taps if attribute in instance}
    instance.update(taps)
    try:
        yield
    finally:
        for attribute in taps:
            instance.pop(attribute, None)
        instance.update(before)


def recomputed(module: nn.Module, within: Within) -> dict[str, Any]:
    """What is to stand in so that `module`, if it computes again in backward, does so `within` a context.

    Layers of transformers checkpoint their forward, not their call: in backward neither hooks nor a forward of the instance
    come by, only the function that they gave to the checkpointing one. Nothing for any other module.
    """
    checkpointing = module.__dict__.get(CHECKPOINTING)
    if checkpointing is None or not getattr(module, "gradient_checkpointing", False):
        return {}
    return {CHECKPOINTING: partial(_checkpoint, checkpointing, within)}


def _checkpoint(checkpointing: Callable[..., Any], within: Within, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpointing(partial(_run, within, function), *args, **kwargs)


def _run(within: Within, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with within():
        return function(*args, **kwargs)
