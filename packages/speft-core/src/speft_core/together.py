"""All parameters of a tuner written at once, when a training forward begins, by one call of the compiled loop.

Every training forward of a layer must find base + values in its weight, since optimizers and engines may change values without
a trace. Hundreds of small writes, each between two large products, cost several times what one call for all of them does. So
the layer that runs first writes for all others too. What was written serves a layer's next forward only: not after any backward,
which an update may follow, and not once the weight or the values are seen to be others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .ops import native
from .ops.recipes import sharded

if TYPE_CHECKING:
    from .slots import Slot


class Together:
    """The slots that are written together. Those that the compiled loop does not take (see native.writes) write for themselves."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._first: Slot | None = None  # the one that a pass through the model begins with
        self._laid: tuple[tuple[object, ...], native.Changes, list[Slot]] | None = None
        self._written: dict[Slot, tuple[int, int]] = {}
        self.backwards = 0  #: layers whose backward has come, in all
        self.counted = False  #: whether outside.py still waits for backwards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid": None, "_written": {}}  # addresses, which a copy must not have

    def add(self, slots: Iterable[Slot]) -> None:
        """Slots of one parameter (several where it is tied)."""
        self._slots += slots

    @property
    def asks(self) -> bool:
        """Whether anything follows from `over`: without it dense parts alone cost no call of Python in backward."""
        return self.counted or bool(self._slots)

    def covers(self, slot: Slot) -> bool:
        """Whether base + values is in the slot's weight for its training forward, now or already; to be asked once a forward."""
        if self._first is None:
            self._first = slot
        if slot is self._first and self._written.get(slot) != _seen(slot):
            self._write_from(slot)
        return self._written.pop(slot, None) == _seen(slot)

    def has_written(self, slot: Slot) -> bool:
        """As `covers`, for a reader that is not the slot's forward."""
        if not self._written:
            self._write_from(slot)
        return self._written.get(slot) == _seen(slot)

    def over(self) -> None:
        """A backward has come: values may be updated."""
        self._written.clear()
        self.backwards += 1

    def _write_from(self, slot: Slot) -> None:
        if slot.weight.is_cpu and not sharded(slot.weight):
            self._write()  # with ZeRO-3, to look at another layer's weight is to gather it

    def _write(self) -> None:
        state = tuple(part for slot in self._slots for part in _place(slot))
        if self._laid is None or self._laid[0] != state:
            changes, covered = {}, []
            for slot in self._slots:
                change = (slot.weight, slot.indices_K, slot.base_K, slot.values_K)
                if not sharded(slot.weight) and native.writes(change):
                    changes[slot.weight.data_ptr()] = change
                    covered.append(slot)
            self._laid = state, native.Changes(list(changes.values())), covered
        _, changes_of_all, slots = self._laid
        if slots:
            changes_of_all.run("add")
        self._written = {slot: _seen(slot) for slot in slots}


def _seen(slot: Slot) -> tuple[int, int]:
    return slot.weight.data_ptr(), slot.values_K._version


def _place(slot: Slot) -> tuple[object, ...]:
    """What tells whether the tensors that the compiled loop was given are still the slot's."""
    weight, values_K = slot.weight, slot.values_K
    return weight.data_ptr(), slot.indices_K.data_ptr(), slot.base_K.data_ptr(), values_K.data_ptr(), weight.dtype, values_K.dtype
