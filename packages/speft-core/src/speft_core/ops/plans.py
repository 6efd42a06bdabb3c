"""The backward plans: ways to get k entries of grad_yᵀ x without the dense product. A table; `auto` picks a row.

A plan's function runs in backward: from the input [T, I] and grad_y [..., O] it makes the gradient of the K kept entries, in fp32
(float64 for float64 inputs). Each equals reference.weight_gradient_entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UserError
from . import native
from .blocks import compact_entries, dense_entries
from .inputs import Inputs
from .layout import Layout
from .sampled import sampled_entries


@dataclass(frozen=True)
class Plan:
    """A row of the table: the plan's name, its function, in a few words how, and whether layers that read one input share work."""

    name: str
    entries: Callable[[Inputs, torch.Tensor, Layout], torch.Tensor]
    how: str
    shares: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("compact", compact_entries, "dense product of touched rows and columns"),
        Plan("sampled", sampled_entries, "one dot product per kept entry, by PyTorch or Triton"),
        Plan("native", native.native_entries, "one dot product per kept entry, compiled for this CPU", shares=True),
        Plan("dense", dense_entries, "tiled product of all rows, gathered"),
    )
}


def plan_named(backward: str, layout: Layout, weight: torch.Tensor) -> tuple[Plan, str]:
    """The plan for `backward` ("auto" or a name of the table) and the reason; UserError for another name or one that cannot run."""
    from .cost import choose

    if backward == "auto":
        name, reason = choose(layout, weight)
        return PLANS[name], reason
    if backward not in PLANS:
        raise UserError(f"backward must be auto or one of {', '.join(PLANS)}, got {backward!r}")
    if backward == "native" and not native.fits(weight):
        why = native.reason() or f"it takes fp32 and bf16 weights on a CPU, not {weight.dtype} on {weight.device.type}"
        raise UserError(f"backward native cannot run here: {why}; use auto")
    return PLANS[backward], "asked for"
