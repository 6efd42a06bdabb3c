"""AdapterBank: many adapters of one model in memory, one of them in the weights; a switch writes k scalars, exactly.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import SparseAdapter
from .calls import Life, depth, life
from .errors import UserError, nearest
from .targets import base_parameters
from .writing import add_values, gather, scatter

LOOK_SECONDS = 1.0  # who waits looks that often whether a forward that it waits for was interrupted


@dataclass(frozen=True)
class _Entry:
    """One adapter, ready to be written: per tensor its indices, the base's entries and the adapted ones; dense tensors whole."""

    sparse: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    dense: dict[str, torch.Tensor]


@dataclass
class _Inside:
    """What a thread is in: `using` blocks and forwards; whether its stack shows the forwards (those compiled it does not).

    life: of the thread, which may end within a forward.
    """

    life: weakref.ref[Life]
    blocks: int = 0
    forwards: int = 0
    visible: bool = True


class AdapterBank:
    """Holds adapters of `model` by name and puts one at a time into its weights, in place.

    A switch restores the entries of the adapter that is in and writes those of the next: time and memory in proportion to
    the number of kept scalars, and the same bits however often it is done. It waits for forwards in progress in other
    threads, and they for it. `with bank.using("a"):` holds an adapter over several forwards, such as a generation; threads
    that use the same adapter run side by side, others wait their turn. On an accelerator, switch from the stream that
    computes.

    Called with a batch, it answers each row by the row's own adapter. While an adapter is in, the model counts as having
    one applied: `attach` refuses it.

    adapters: name -> adapter to begin with; check_base: whether each must have been made for this model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, SparseAdapter] | None = None, check_base: bool = True) -> None:
        if getattr(model, "_speft_tuner", None) is not None:
            raise UserError("a tuner is attached to this model; call its detach() before making a bank")
        if getattr(model, "_speft_applied", None):
            raise UserError("an adapter is applied to this model; restore it before making a bank")
        self.model = model
        self._entries: dict[str, _Entry] = {}
        self._active: str | None = None
        self._written: str | None = None  # whose entries may be in the weights; another than `_active` after a failure
        self._torn = False  # a write failed, and putting back what was in failed too
        self._base_dense: dict[str, torch.Tensor] = {}
        self._changed = threading.Condition()
        self._inside: dict[int, _Inside] = {}  # by thread; none that is in nothing
        self._queue: deque[object] = deque()
        self._stack: list[Any] = model.__dict__.setdefault("_speft_applied", [])
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._enter_forward()),
            model.register_forward_hook(lambda *_: self._leave_forward(), always_call=True),
        ]
        try:
            for name, adapter in (adapters or {}).items():
                self.add(name, adapter, check_base)
        except BaseException:  # Ctrl-C and a full memory too
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """The adapters held, in the order they were added."""
        return list(self._entries)

    @property
    def active(self) -> str | None:
        """The adapter in the weights, or None for the base."""
        return self._active

    def add(self, name: str, adapter: SparseAdapter, check_base: bool = True) -> None:
        """Hold `adapter` under `name`; UserError when the name is taken or the model is not its base."""
        if name in self._entries:
            raise UserError(f"the bank holds an adapter {name!r} already; remove it first")
        adapter.check()
        with self._alone():
            before = self._active
            self._write(None)
            try:
                if check_base:
                    adapter.check_base(self.model)
                self._entries[name] = self._prepare(adapter)
            finally:
                self._write(before)

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is in the weights, the base comes back first."""
        self._known(name)
        with self._alone():
            if name in (self._active, self._written):
                self._write(None)
            del self._entries[name]

    def switch(self, name: str | None) -> None:
        """Put adapter `name` (None: the base) into the weights, after the forwards in progress."""
        self._known(name)
        with self._alone():
            self._write(name)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Hold adapter `name` (None: the base) in the weights for the block; it stays in afterwards."""
        self._known(name)
        thread, forwards = threading.get_ident(), self._enter(name, switch=True)
        try:
            yield self.model
        finally:
            self._leave_block(thread, forwards)

    @torch.no_grad()
    def __call__(self, routes: Sequence[str | None], **batch: Any) -> list[torch.Tensor]:
        """The logits of each row, in order; `routes` names the adapter of each row, None the base.

        Rows of one adapter are run together; what is in `batch` with one entry a row is cut accordingly. The answers are
        those of the single models, whatever the adapters change. The adapter that was in is in again afterwards.
        """
        for name in routes:
            self._known(name)
        before, answers = self._active, dict[int, torch.Tensor]()
        try:
            for name in dict.fromkeys(routes):
                rows = [i for i, route in enumerate(routes) if route == name]
                with self.using(name):
                    answers.update(zip(rows, self.model(**_rows(batch, rows, len(routes))).logits, strict=True))
        finally:
            if self._active != before:  # not so within a `using` block, where a switch is refused
                self.switch(before)
        return [answers[i] for i in range(len(routes))]

    def close(self) -> None:
        """Bring the base back and let go of the model."""
        with self._alone():
            self._write(None)
            self._entries.clear()
        for hook in self._hooks:
            hook.remove()

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self._entries:
            held = ", ".join(self._entries) or "none"
            raise UserError(f"the bank has no adapter {name!r}; it holds {held}.{nearest(name, self._entries)}")

    @torch.no_grad()
    def _prepare(self, adapter: SparseAdapter) -> _Entry:
        parameters, sparse, dense = adapter._matching(self.model), {}, {}
        for name, delta in adapter.deltas.items():
            weight = parameters[name]
            indices_K = delta.indices_K.to(weight.device)
            base_K = gather(weight, indices_K)
            sparse[name] = (indices_K, base_K, add_values(base_K, delta.values_K.to(weight.device)))
        for name, tensor in adapter.dense.items():
            dense[name] = tensor.to(parameters[name])
            if name not in self._base_dense:
                self._base_dense[name] = parameters[name].detach().clone()
        return _Entry(sparse, dense)

    def _write(self, name: str | None) -> None:
        """Restore what is in, write `name`; if that fails, what was in is in again. Only while alone."""
        before = self._active
        if name == before and not self._torn:
            return
        if getattr(self.model, "_speft_tuner", None) is not None:
            raise UserError("a tuner is attached to this model; detach it before switching adapters")
        if self._stack and self._stack[-1] is not self:
            raise UserError("an adapter was applied on top of the bank's; restore it before switching")
        try:
            self._put(name)
        except BaseException:
            self._put(before)
            raise

    @torch.no_grad()
    def _put(self, name: str | None) -> None:
        parameters, self._torn = base_parameters(self.model), True
        self._stack[:] = [self]
        if self._written is not None:
            old = self._entries[self._written]
            for weight, (indices_K, base_K, _) in old.sparse.items():
                scatter(parameters[weight], indices_K, base_K)
            for weight in old.dense:
                parameters[weight].data.copy_(self._base_dense[weight])
        self._written = name
        if name is not None:
            new = self._entries[name]
            for weight, (indices_K, _, sum_K) in new.sparse.items():
                scatter(parameters[weight], indices_K, sum_K)
            for weight, tensor in new.dense.items():
                parameters[weight].data.copy_(tensor)
        else:
            self._stack.clear()
        self._active, self._torn = name, False

    def _enter(self, name: str | None, switch: bool) -> int:
        """Wait until this thread may go on with the adapter that is in (or `name`, switching to it), and count it as inside.

        Returns how many forwards it was in before.
        """
        me = threading.get_ident()
        with self._changed:
            calls = depth(self.model, me)
            self._forget_interrupted(me, calls, starting=not switch)
            if me in self._inside:
                if switch and name != self._active:
                    raise UserError(f"this thread is using adapter {self._active!r}; leave that before using {name!r}")
            else:
                fits = lambda: not self._inside or not switch or name == self._active  # noqa: E731
                # A forward of another thread may be what a `using` block waits for (a generation that streams its text), so
                # it does not queue behind those who wait for the block's end.
                within = lambda: not switch and any(i.blocks for i in self._inside.values())  # noqa: E731
                with self._turn(fits, within):
                    if switch:
                        self._write(name)
            inside = self._inside.setdefault(me, _Inside(life()))
            inside.life = life()  # the number may be that of a thread that ended within a block
            before = inside.forwards
            if switch:
                inside.blocks += 1
            else:
                inside.forwards, inside.visible = before + 1, bool(calls) and (inside.visible or not before)
            return before

    def _enter_forward(self) -> None:
        self._enter(None, switch=False)

    def _leave_forward(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if me in self._inside and self._inside[me].forwards:
                self._inside[me].forwards -= 1
                self._tell(me)

    def _leave_block(self, thread: int, forwards: int) -> None:
        """The block's end, and that of the forwards begun in it, to which none comes when one is interrupted."""
        with self._changed:
            inside = self._inside[thread]
            inside.blocks -= 1
            inside.forwards = min(inside.forwards, forwards)
            self._tell(thread)

    def _tell(self, thread: int) -> None:
        """Let the others see that a thread is in less than before."""
        inside = self._inside[thread]
        if not inside.blocks and not inside.forwards:
            del self._inside[thread]
        self._changed.notify_all()

    def _forget_interrupted(self, thread: int, calls: int | None, starting: bool = False) -> None:
        """Count a thread's forwards no more that are not among the `calls` of its stack. starting: the last of these is not counted yet."""
        inside = self._inside.get(thread)
        ended = inside is not None and inside.life() is None
        if inside is None or not (ended or starting or (inside.visible and calls is not None)):
            return
        # A call that begins on a stack not to be seen is taken for an outermost one.
        going_on = 0 if ended else max(0, (calls or 0) - starting)
        if going_on < inside.forwards:
            inside.forwards = going_on
            self._tell(thread)

    @contextmanager
    def _turn(self, fits: Callable[[], bool], within: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait until it is this thread's turn and `fits`, or `within` whoever's turn it is. The lock is held."""
        ticket = object()
        self._queue.append(ticket)
        try:
            while not self._changed.wait_for(lambda: within() or (self._queue[0] is ticket and fits()), LOOK_SECONDS):
                for thread in list(self._inside):
                    self._forget_interrupted(thread, depth(self.model, thread))
            yield
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait, in turn, until no thread is inside, and keep others out for the block."""
        me = threading.get_ident()
        with self._changed:
            self._forget_interrupted(me, depth(self.model, me))
            if me in self._inside:
                raise UserError("this thread is inside a forward or `using`; leave it before switching adapters")
            with self._turn(lambda: not self._inside):
                yield


def _rows(batch: Mapping[str, Any], rows: list[int], total: int) -> dict[str, Any]:
    """Those rows of every tensor with `total` of them; all else as it is."""
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.shape[:1] == (total,) else v for k, v in batch.items()}
