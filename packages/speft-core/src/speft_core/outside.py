"""Parameters that another module's forward reads: Mamba's mixer multiplies by `dt_proj.weight` and never calls `dt_proj`.

Their own module's forward (slots.py) does not come by then. So at first every adapted parameter is served twice: by its own
module's forward, and by a tap that stands in for it while the forward of a module above runs. After a backward it is known which
taps were read. Parameters whose module is called and whose tap is not read, nearly always all of them, are left to their modules
from then on; with none left, nothing of this file runs any more.

Modules above, not the model alone: with activation checkpointing a layer runs again in backward, when the model's own forward is
over. A compiled graph does not come by here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .ops.recipes import sharded
from .partitioned import is_partitioned
from .slots import AttachedForward, Slot
from .standing import TURN, recomputed, standing_in
from .together import Together
from .whole_slots import WholeSlot

#: In evaluation they take a path of their own, which reads the weights of modules that training calls.
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


#: Backwards after which a module that is neither called nor read is no longer waited for: a text model's vision tower, an idle expert.
#: Dense parts of 16 bits always are: the ordinary parameters that they stand for would train whenever they are read.
PATIENCE = 8


#: A module in its forward, what ends with that, and how many backwards had come when all below it was written; -1 where gradients are on.
_Entry = tuple[nn.Module, ExitStack, int]


class Outside:
    """The hooks on modules above those of `forwards`. A deep copy of the model has its own, so hooks are methods and not closures."""

    def __init__(self, model: nn.Module, forwards: Sequence[AttachedForward], together: Together) -> None:
        self._together, self._backwards, self._patience = together, together.backwards, PATIENCE
        self._read: set[Slot] = set()  # by a module above
        self._served: dict[int, set[AttachedForward]] = {}  # thread -> those whose taps it has put in place
        self._compiled: set[AttachedForward] = set()
        self._open: dict[int, list[_Entry]] = {}  # thread -> its forwards in progress
        self._hooks: list[Any] = []
        self._fused = {m for layer in model.modules() if isinstance(layer, FUSED) for m in layer.modules()}
        served = {f.module: f for f in forwards}
        above = {m: [served[b] for b in m.modules() if b in served and b is not m] for m in model.modules()}
        self._above = {module: below for module, below in above.items() if below}
        self._containing: dict[nn.Module, set[nn.Module]] = {module: set() for module in self._above}
        for module in self._above:
            for within in module.modules():
                if within in self._containing:
                    self._containing[within].add(module)
        together.counted = bool(self._above)
        self.install()

    def install(self) -> None:
        """Put the hooks on."""
        for module in self._above:
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take them off, and the taps of forwards that were interrupted, to whose end torch calls no hook."""
        self._take_off()
        for opened in self._open.values():
            _close(opened)
        self._open.clear()

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with TURN:
            opened = self._open.setdefault(threading.get_ident(), [])
            if opened and module in self._containing[opened[0][0]]:
                _close(opened)  # a forward that was interrupted: none calls what contains it
            if torch._C._current_graph_task_id() < 0 and not any(self._open.values()):  # a forward begins, not one within a backward
                self._see_compiled()
                self._decide()
            if module not in self._above:  # just decided: no `_leave` will come
                return
            stack, written = ExitStack(), -1
            if torch.is_grad_enabled():
                stack.enter_context(self._serving(module))
                if again := recomputed(module, functools.partial(self._serving, module)):
                    stack.enter_context(standing_in(module, again))
            else:
                written = self._together.backwards
                above, _, then = opened[-1] if opened else (None, None, -1)
                if then != written or above not in self._containing[module]:  # else the forward above wrote for this one
                    self._write(module)
            opened.append((module, stack, written))

    def _write(self, module: nn.Module) -> None:
        """For a forward without gradients, and for those within it; what has a tap in place stays stale, for an update may follow."""
        served = self._served.get(threading.get_ident(), ())
        for forward in self._whole(module):
            for slot in forward.slots:
                if forward not in served:
                    slot.write()
                elif slot.stale:
                    slot.rewrite()

    @contextmanager
    def _serving(self, module: nn.Module) -> Iterator[None]:
        """Within it the parameters below `module` have taps in their places."""
        served = self._served.setdefault(threading.get_ident(), set())
        fresh = [f for f in self._whole(module) if f not in served]
        served.update(fresh)
        try:
            with ExitStack() as stack:
                for forward in fresh:
                    stack.enter_context(standing_in(forward.module, {s.attribute: self._tap(s) for s in forward.slots}))
                yield
        finally:
            served.difference_update(fresh)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        opened = self._open.get(threading.get_ident())
        if opened and opened[-1][0] is module:
            opened.pop()[1].close()

    def _whole(self, module: nn.Module) -> list[AttachedForward]:
        """Those below it that may be looked at: weights in shards are gathered for their own module alone."""
        below = (f for f in self._above.get(module, ()) if f not in self._compiled)
        return [f for f in below if not any(is_partitioned(s.own) or sharded(s.weight) for s in f.slots)]

    def _see_compiled(self) -> None:
        """Modules compiled by themselves, or within one that is, serve their own parameters: a tap would be a graph's input."""
        compiled = [below for module, below in self._above.items() if _is_compiled(module)]
        self._compiled = {f for below in compiled for f in below}
        self._compiled |= {f for below in self._above.values() for f in below if _is_compiled(f.module)}

    def _tap(self, slot: Slot) -> torch.Tensor:
        slot.stale = True
        if not isinstance(slot, WholeSlot) and not self._together.has_written(slot):
            slot.rewrite()
        return slot.tap(self._read)

    def _decide(self) -> None:
        """Once a backward has come: leave to their modules the parameters that only these read."""
        if self._together.backwards == self._backwards:
            return
        self._backwards, self._patience = self._together.backwards, self._patience - 1
        done = {
            f
            for below in self._above.values()
            for f in below
            if (f.called or f in self._compiled or (self._patience <= 0 and not _any_whole(f)))
            and f.module not in self._fused and self._read.isdisjoint(f.slots)
        }
        if done:
            self._take_off()
            left = {module: [f for f in below if f not in done] for module, below in self._above.items()}
            self._above = {module: below for module, below in left.items() if below}
            self._together.counted = bool(self._above)
            self.install()


def _any_whole(forward: AttachedForward) -> bool:
    """Whether one of its parameters is a head of a task, say, which may be read long after training began."""
    return any(isinstance(slot, WholeSlot) for slot in forward.slots)


def _close(opened: list[_Entry]) -> None:
    while opened:
        opened.pop()[1].close()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
