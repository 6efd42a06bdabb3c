"""Writing base + values into a weight in place, and taking it back: k scattered writes, no copy of the weight.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import torch

from .ops import native


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


def write_sum(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor, values_K: torch.Tensor) -> None:
    """weight[indices] = add_values(base, values), in place: one compiled loop where there is one, the same bits either way."""
    values_K = values_K.detach()
    plain = values_K.dtype == torch.float32 and indices_K.dtype == torch.int32 and base_K.dtype == weight.dtype
    on_cpu = weight.device.type == values_K.device.type == indices_K.device.type == base_K.device.type == "cpu"
    whole = values_K.is_contiguous() and weight.numel() and values_K.numel() == indices_K.numel()
    if plain and on_cpu and whole and native.fits(weight):
        native.native_write(weight, indices_K, base_K, values_K)
    else:
        scatter(weight, indices_K, add_values(base_K, values_K))
