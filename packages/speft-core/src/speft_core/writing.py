"""Writing base + values into a weight in place, and taking it back: k scattered writes, no copy of the weight.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .ops import native


def flat_view(weight: torch.Tensor) -> torch.Tensor:
    """The weight's storage as one flat tensor; the weight must be contiguous.

    `.data` and not `.detach()`: writes must not count as a change of the weight, or two forwards before one backward raise.
    """
    return weight.data.view(-1)


def gather(weight: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """A copy of the K entries of `weight` at `indices_K`, in the weight's dtype."""
    return gather_all([(weight, indices_K)])[0]


def scatter(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor) -> None:
    """Write `entries_K` (any dtype, rounded to the weight's) at `indices_K` of `weight`, in place."""
    scatter_all([(weight, indices_K, entries_K)])


def write_sum(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor) -> None:
    """weight[indices] = add_values(base, values), in place."""
    write_sums([(weight, indices_K, base_K, values_K)])


def add_values(base_K: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """base + values in at least fp32, rounded once to the base's dtype: the one definition of an adapted entry."""
    if base_K.dtype == values_K.dtype:
        return base_K + values_K.detach()  # PyTorch adds 16-bit numbers in fp32 and rounds once
    wide = torch.promote_types(torch.promote_types(base_K.dtype, values_K.dtype), torch.float32)
    return (base_K.to(wide) + values_K.detach().to(wide)).to(base_K.dtype)


# Of many tensors at once, no two of one weight: one compiled loop for those that it takes, PyTorch's operators for the others,
# with the same bits.


def gather_all(places: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """`gather` of each (weight, indices_K)."""
    changes: list[native.Change] = [
        (weight, indices_K, torch.empty(indices_K.numel(), dtype=weight.dtype, device=weight.device), None)
        for weight, indices_K in places
    ]

    def plain(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, _: torch.Tensor | None) -> None:
        # Twice as fast as with int32, the conversion included.
        torch.index_select(flat_view(weight), 0, indices_K.long(), out=base_K)

    _each("take", changes, plain)
    return [base_K for _, _, base_K, _ in changes]


def scatter_all(entries: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """`scatter` of each (weight, indices_K, entries_K)."""

    def plain(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor, _: torch.Tensor | None) -> None:
        flat_view(weight).index_copy_(0, indices_K.long(), entries_K)

    _each("put", [(w, indices_K, entries_K.to(w.dtype), None) for w, indices_K, entries_K in entries], plain)


def write_sums(changes: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """`write_sum` of each (weight, indices_K, base_K, values_K)."""

    def plain(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor | None) -> None:
        assert values_K is not None
        flat_view(weight).index_copy_(0, indices_K.long(), add_values(base_K, values_K).to(weight.dtype))

    _each("add", changes, plain)


def _each(what: str, changes: Sequence[native.Change], plain: Callable[..., None]) -> None:
    fast = []
    for change in changes:
        if native.writes(change):
            fast.append(change)
        else:
            plain(*change)
    if fast:
        native.native_each(what, fast)
