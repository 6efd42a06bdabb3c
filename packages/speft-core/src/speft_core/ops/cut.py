"""Which rows of grad_y and columns of x a product reads: those that hold an entry, or all where a gather costs more than it saves.

Shape suffixes: N wanted rows or columns, P picked ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EVEN = {"cpu": 1, "cuda": 64}  # a GPU's matrix units want multiples of it; a product of odd sizes takes several times as long
VECTOR = 8  # what a row of a GPU's operand must be a multiple of, to be read whole


@dataclass(frozen=True, eq=False)
class Cut:
    """What is picked (None: all, in order), how many that are, and where each wanted one is among them."""

    picks_P: torch.Tensor | None
    size: int
    places_N: torch.Tensor

    @classmethod
    def of(cls, wanted_N: torch.Tensor, width: int, whole_above: float) -> Cut:
        """Of the sorted `wanted_N` among `width`: all from the share `whole_above` on, else the wanted ones; on a GPU an even
        number of them, filled up by the last one."""
        count, even = wanted_N.numel(), EVEN[kind_of(wanted_N)]
        padded = -(-count // even) * even
        if padded >= whole_above * width and (even == 1 or width % VECTOR == 0):
            return cls(None, width, wanted_N)
        picks_P = torch.cat([wanted_N, wanted_N[-1:].expand(padded - count)])
        return cls(picks_P, padded, torch.arange(count, device=wanted_N.device, dtype=wanted_N.dtype))


def kind_of(tensor: torch.Tensor) -> str:
    """The kind of device, for tables: cpu, or cuda for every accelerator."""
    return "cpu" if tensor.device.type == "cpu" else "cuda"
