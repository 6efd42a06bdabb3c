"""Writing base + values into a weight in place, and taking it back: k scattered writes, no copy of the weight.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ops import native


def flat_view(weight: torch.Tensor) -> torch.Tensor:
    """The weight's storage as one flat tensor; the weight must be contiguous.

    `.data` and not `.detach()`: writes must not count as a change of the weight, or two forwards before one backward raise.
    """
    return weight.data.view(-1)


def gather(weight: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """A copy of the K entries of `weight` at `indices_K`, in the weight's dtype."""
    return flat_view(weight).index_select(0, indices_K.long())  # twice as fast as with int32, the conversion included


def scatter(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor) -> None:
    """Write `entries_K` (any dtype, rounded to the weight's) at `indices_K` of `weight`, in place."""
    if entries_K.dtype == weight.dtype and native.writes(weight, indices_K, entries_K):
        native.native_put(weight, indices_K, entries_K)
    else:
        flat_view(weight).index_copy_(0, indices_K.long(), entries_K.to(weight.dtype))


def add_values(base_K: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """base + values in at least fp32, rounded once to the base's dtype: the one definition of an adapted entry."""
    if base_K.dtype == values_K.dtype:
        return base_K + values_K.detach()  # PyTorch adds 16-bit numbers in fp32 and rounds once
    wide = torch.promote_types(torch.promote_types(base_K.dtype, values_K.dtype), torch.float32)
    return (base_K.to(wide) + values_K.detach().to(wide)).to(base_K.dtype)


def write_sum(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor) -> None:
    """weight[indices] = add_values(base, values), in place: one compiled loop where there is one, the same bits either way."""
    values_K = values_K.detach()
    if base_K.dtype == weight.dtype and native.writes(weight, indices_K, base_K, values_K):
        native.native_add(weight, indices_K, values_K, base_K=base_K)
    else:
        scatter(weight, indices_K, add_values(base_K, values_K))


def exchange(weight: torch.Tensor, indices_K: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """Add `values_K` to the entries of `weight`, in place, and return what they were: gather and write_sum in one pass."""
    values_K = values_K.detach()
    if native.writes(weight, indices_K, values_K):
        held_K = torch.empty(indices_K.numel(), dtype=weight.dtype)
        native.native_add(weight, indices_K, values_K, held_K=held_K)
        return held_K
    base_K = gather(weight, indices_K)
    scatter(weight, indices_K, add_values(base_K, values_K))
    return base_K


def exchange_all(changes: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> list[torch.Tensor]:
    """For each (weight, indices_K, values_K, base_K or None): add the values in place; the entries as they were. base_K, where the
    caller has read it, saves reading it again. No two may be of one weight."""
    held = [base_K for *_, base_K in changes]
    fast: list[native.Change] = []
    for place, (weight, indices_K, values_K, base_K) in enumerate(changes):
        if not native.writes(weight, indices_K, values_K):
            if base_K is None:
                held[place] = exchange(weight, indices_K, values_K)
            else:
                write_sum(weight, indices_K, base_K, values_K)
            continue
        if base_K is None:
            held[place] = torch.empty(indices_K.numel(), dtype=weight.dtype)
        fast.append((weight, indices_K, base_K, values_K, held[place] if base_K is None else None))
    if fast:
        native.native_add_all(fast)
    return [base_K for base_K in held if base_K is not None]


def scatter_all(entries: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """`scatter` of many (weight, indices_K, entries_K). No two may be of one weight."""
    fast: list[native.Change] = []
    for weight, indices_K, entries_K in entries:
        if entries_K.dtype == weight.dtype and native.writes(weight, indices_K, entries_K):
            fast.append((weight, indices_K, entries_K, None, None))
        else:
            scatter(weight, indices_K, entries_K)
    if fast:
        native.native_put_all(fast)
