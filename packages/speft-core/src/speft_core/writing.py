"""Writing base + values into a weight in place, and taking it back: k scattered writes, no copy of the weight.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .ops import native
from .partitioned import whole


def flat_view(weight: torch.Tensor) -> torch.Tensor:
    """The weight's storage as one flat tensor; the weight must be contiguous.

    `.data` and not `.detach()`: writes must not count as a change of the weight, or two forwards before one backward raise.
    """
    return weight.data.view(-1)


def gather(weight: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """A copy of the K entries of `weight` at `indices_K`, in the weight's dtype and on its device, to which the model may have moved."""
    base_K = torch.empty(indices_K.numel(), dtype=weight.dtype, device=weight.device)
    _run("take", [(weight, indices_K.to(weight.device), base_K, None)])
    return base_K


def scatter(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor) -> None:
    """Write `entries_K` (any dtype, rounded to the weight's; any device) at `indices_K` of `weight`, in place."""
    _run("put", [(weight, indices_K.to(weight.device), entries_K.to(weight.device, weight.dtype), None)])


def write_sum(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor) -> None:
    """weight[indices] = add_values(base, values), in place."""
    _run("add", [(weight, indices_K, base_K, values_K)])


class Sum:
    """write_sum at every forward: what the compiled loop reads is laid out anew only where a tensor has moved."""

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._laid: tuple[native.Changes | None, Sequence[native.Change]] = (None, ())

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": (), "_laid": (None, ())}  # addresses, which a copy must not have

    def write(self, weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor) -> None:
        """Write base + values."""
        change = (weight, indices_K, base_K, values_K)
        seen = (*(t.data_ptr() for t in change), weight.dtype, values_K.dtype, indices_K.numel())
        if seen != self._seen:
            self._laid, self._seen = _split([change]), seen
        _go("add", *self._laid)


def add_values(base_K: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """base + values in at least fp32, rounded once to the base's dtype: the one definition of an adapted entry."""
    if base_K.dtype == values_K.dtype:
        return base_K + values_K.detach()  # PyTorch adds 16-bit numbers in fp32 and rounds once
    wide = torch.promote_types(torch.promote_types(base_K.dtype, values_K.dtype), torch.float32)
    return (base_K.to(wide) + values_K.detach().to(wide)).to(base_K.dtype)


class Entries:
    """The entries of many weights, read, changed and put back together; no two of one weight.

    places: (weight, indices_K, values_K) of each, on one device. base: the weights' own entries, read at once.
    """

    def __init__(self, places: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        self.flat, base = _buffers(places)
        changes = [(w, i_K, base_K, v_K) for (w, i_K, v_K), base_K in zip(places, base, strict=True)]
        self._changes, self._at = changes, [(w.data_ptr(), w.dtype) for w, *_ in changes]
        self._fast, self._slow = _split(changes)
        _go("take", self._fast, self._slow)

    @property
    def base(self) -> list[torch.Tensor]:
        """The entries as they were, [K] each, in the weights' dtypes: views of `flat`, which has one tensor for each dtype and device."""
        return [base_K for _, _, base_K, _ in self._changes]

    def add(self) -> None:
        """Write base + values."""
        _go("add", self._fast, self._slow)

    def put_back(self, weights: Sequence[torch.Tensor]) -> None:
        """Write base, bit for bit. `weights`: what the model holds now, which may have moved to another device since."""
        if [(w.data_ptr(), w.dtype) for w in weights] == self._at:
            _go("put", self._fast, self._slow)
            return
        for weight, (_, indices_K, base_K, _) in zip(weights, self._changes, strict=True):
            scatter(weight, indices_K, base_K)


def _buffers(places: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A tensor for each dtype and device of the weights, and each weight's part of one: few allocations, compared at once."""
    sizes: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for weight, indices_K, _ in places:
        sizes.setdefault((weight.dtype, weight.device), []).append(indices_K.numel())
    flat = {kind: torch.empty(sum(counts), dtype=kind[0], device=kind[1]) for kind, counts in sizes.items()}
    parts = {kind: iter(flat[kind].split(counts)) for kind, counts in sizes.items()}
    return list(flat.values()), [next(parts[w.dtype, w.device]) for w, *_ in places]


class ShardedEntries:
    """As Entries, of weights in shards: gathered, changed and let go one after the other. `check`: of each base."""

    def __init__(
        self, places: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], check: Callable[[torch.Tensor], None]
    ) -> None:
        self._places, self._base = places, []
        for weight, indices_K, _ in places:
            with whole([weight]):
                self._base.append(gather(weight, indices_K))
                check(self._base[-1])

    def add(self) -> None:
        """Write base + values."""
        for (weight, indices_K, values_K), base_K in zip(self._places, self._base, strict=True):
            with whole([weight], change=True):
                write_sum(weight, indices_K, base_K, values_K)

    def put_back(self, weights: Sequence[torch.Tensor]) -> None:
        """Write base, bit for bit."""
        for weight, (_, indices_K, _), base_K in zip(weights, self._places, self._base, strict=True):
            with whole([weight], change=True):
                scatter(weight, indices_K, base_K)


def _run(what: str, changes: Sequence[native.Change]) -> None:
    _go(what, *_split(changes))


def _go(what: str, fast: native.Changes | None, slow: Sequence[native.Change]) -> None:
    for change in slow:
        PLAIN[what](*change)
    if fast is not None:
        fast.run(what)


def _split(changes: Sequence[native.Change]) -> tuple[native.Changes | None, list[native.Change]]:
    """Those that one compiled loop takes, and those that are left to PyTorch's operators, which give the same bits."""
    fast = [change for change in changes if native.writes(change)]
    slow = [change for change in changes if not native.writes(change)] if len(fast) < len(changes) else []
    return (native.Changes(fast) if fast else None), slow


# Indices as int64: twice as fast as with int32, the conversion included.
PLAIN: dict[str, Callable[..., Any]] = {
    "take": lambda w, i_K, base_K, _: torch.index_select(flat_view(w), 0, i_K.long(), out=base_K),
    "put": lambda w, i_K, base_K, _: flat_view(w).index_copy_(0, i_K.long(), base_K),
    "add": lambda w, i_K, base_K, v_K: flat_view(w).index_copy_(0, i_K.long(), add_values(base_K, v_K).to(w.dtype)),
}
