"""Writing base + values into a weight in place, and taking it back: k scattered writes, no copy of the weight.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import torch


def flat_view(weight: torch.Tensor) -> torch.Tensor:
    """The weight's storage as one flat tensor; the weight must be contiguous.

    `.data` and not `.detach()`: writes must not count as a change of the weight, or two forwards before one backward raise.
    """
    return weight.data.view(-1)


def gather(weight: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """A copy of the K entries of `weight` at `indices_K`, in the weight's dtype."""
    return flat_view(weight).index_select(0, indices_K)


def scatter(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor) -> None:
    """Write `entries_K` (any dtype, rounded to the weight's) at `indices_K` of `weight`, in place."""
    flat_view(weight)[indices_K] = entries_K.to(weight.dtype)


def add_values(base_K: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """base + values in at least fp32, rounded once to the base's dtype: the one definition of an adapted entry."""
    wide = torch.promote_types(torch.promote_types(base_K.dtype, values_K.dtype), torch.float32)
    return (base_K.to(wide) + values_K.detach().to(wide)).to(base_K.dtype)
