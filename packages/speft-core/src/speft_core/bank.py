"""AdapterBank: many adapters of one model in memory, one of them in the weights; a switch writes k scalars, exactly.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import SparseAdapter
from .errors import UserError, nearest
from .targets import base_parameters
from .writing import add_values, gather, scatter


@dataclass(frozen=True)
class _Entry:
    """One adapter, ready to be written: per tensor its indices, the base's entries and the adapted ones; dense tensors whole."""

    sparse: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    dense: dict[str, torch.Tensor]


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
        self._base_dense: dict[str, torch.Tensor] = {}
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> how many forwards and `using` it is in
        self._held = 0  # `using` blocks in progress
        self._queue: deque[object] = deque()
        self._stack: list[Any] = model.__dict__.setdefault("_speft_applied", [])
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._enter(None, switch=False)),
            model.register_forward_hook(lambda *_: self._leave(held=False), always_call=True),
        ]
        try:
            for name, adapter in (adapters or {}).items():
                self.add(name, adapter, check_base)
        except UserError:
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
            if self._active == name:
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
        self._enter(name, switch=True)
        try:
            yield self.model
        finally:
            self._leave(held=True)

    @torch.no_grad()
    def __call__(self, routes: Sequence[str | None], **batch: Any) -> list[torch.Tensor]:
        """The logits of each row, in order; `routes` names the adapter of each row, None the base.

        Rows of one adapter are run together; what is in `batch` with one entry a row is cut accordingly. The answers are
        those of the single models, whatever the adapters change. The adapter that was in is in again afterwards.
        """
        for name in routes:
            self._known(name)
        before, answers = self._active, dict[int, torch.Tensor]()
        for name in dict.fromkeys(routes):
            rows = [i for i, route in enumerate(routes) if route == name]
            with self.using(name):
                answers.update(zip(rows, self.model(**_rows(batch, rows, len(routes))).logits, strict=True))
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
        parameters, sparse, dense = base_parameters(self.model), {}, {}
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

    @torch.no_grad()
    def _write(self, name: str | None) -> None:
        """Restore what is in, write `name`. Only while alone."""
        if name == self._active:
            return
        if getattr(self.model, "_speft_tuner", None) is not None:
            raise UserError("a tuner is attached to this model; detach it before switching adapters")
        if self._stack and self._stack[-1] is not self:
            raise UserError("an adapter was applied on top of the bank's; restore it before switching")
        parameters = base_parameters(self.model)
        if self._active is not None:
            old = self._entries[self._active]
            for weight, (indices_K, base_K, _) in old.sparse.items():
                scatter(parameters[weight], indices_K, base_K)
            for weight in old.dense:
                parameters[weight].data.copy_(self._base_dense[weight])
            self._stack.pop()
        if name is not None:
            new = self._entries[name]
            for weight, (indices_K, _, sum_K) in new.sparse.items():
                scatter(parameters[weight], indices_K, sum_K)
            for weight, tensor in new.dense.items():
                parameters[weight].data.copy_(tensor)
            self._stack.append(self)
        self._active = name

    def _enter(self, name: str | None, switch: bool) -> None:
        """Wait until this thread may go on with the adapter that is in (or `name`, switching to it), and count it as inside."""
        me = threading.get_ident()
        with self._changed:
            if self._inside.get(me):
                if switch and name != self._active:
                    raise UserError(f"this thread is using adapter {self._active!r}; leave that before using {name!r}")
            else:
                ticket = object()
                self._queue.append(ticket)
                try:
                    fits = lambda: not self._inside or not switch or name == self._active  # noqa: E731
                    # A forward of another thread may be what a `using` block waits for (a generation that streams its text), so
                    # it does not queue behind those who wait for the block's end.
                    within = lambda: self._held > 0 and not switch  # noqa: E731
                    self._changed.wait_for(lambda: within() or (self._queue[0] is ticket and fits()))
                    if switch:
                        self._write(name)
                finally:
                    self._queue.remove(ticket)
                    self._changed.notify_all()
            self._inside[me] = self._inside.get(me, 0) + 1
            self._held += switch

    def _leave(self, held: bool) -> None:
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                self._held -= held
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._changed.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait, in turn, until no thread is inside, and keep others out for the block."""
        with self._changed:
            if threading.get_ident() in self._inside:
                raise UserError("this thread is inside a forward or `using`; leave it before switching adapters")
            ticket = object()
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and not self._inside)
                yield
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()


def _rows(batch: Mapping[str, Any], rows: list[int], total: int) -> dict[str, Any]:
    """Those rows of every tensor with `total` of them; all else as it is."""
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.shape[:1] == (total,) else v for k, v in batch.items()}
