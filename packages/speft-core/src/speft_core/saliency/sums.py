"""The running sum of what a pass makes of a parameter's gradients: whole, or in shards as the weights are.

Shape suffixes: T tokens, B a tile of outputs, I inputs.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..partitioned import own_part, shards_of
from ..targets import parameter_shape
from .peers import Peers


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Accumulator:
    """The running sum of one parameter, fp32 (float64 for float64 weights), in the parameter's shape, on `device`.

    Of a partitioned weight each rank sums its own shard, flat: what a batch adds is formed whole in `_term`, and `end` hands
    the ranks their parts of it and lets it go.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, device: torch.device | str | None = None, peers: Peers | None = None
    ) -> None:
        self.name, self.shape, self.dtype, self._home = name, parameter_shape(parameter), wide_dtype(parameter.dtype), parameter.device
        self.is_shard = shards_of(parameter) > 1
        self._peers = peers if self.is_shard else None
        size = own_part(parameter).shape if self.is_shard else self.shape
        self.sum = torch.zeros(size, dtype=self.dtype, device=device or parameter.device)
        self._term: torch.Tensor | None = None

    def add_product(self, left_TB: torch.Tensor, right_TI: torch.Tensor, start: int = 0) -> None:
        """Add leftᵀ right to the rows from `start` on, as a product and then one addition.

        Not inside the product's kernel, which would save a pass over both: it adds to the sum in several parts, and an
        accumulator in host memory, or one that several ranks share, must get the very same bits.
        """
        self.add(left_TB.to(self.dtype).T @ right_TI.to(self.dtype), start)

    def add(self, term: torch.Tensor, start: int = 0) -> None:
        """Add `term` to the rows from `start` on; in the accumulator's dtype and one plain addition an entry."""
        total = self.sum
        if self.is_shard:
            assert self._peers is not None
            if self._term is None:
                self._term = torch.zeros(self._peers.world * self.sum.numel(), dtype=self.dtype, device=self._home)
            total = self._term[: math.prod(self.shape)].view(self.shape)
        part = total[start : start + term.shape[0]] if total.dim() else total
        part.add_(term.to(part.dtype).to(part.device))

    def skip(self) -> None:
        """A batch has nothing to add: to a shared sum zeros, for the other ranks wait for its part."""
        if self.is_shard:
            self.add(torch.zeros((), dtype=self.dtype).expand(self.shape))
            self.end()

    def end(self) -> None:
        """A batch has added its part to a shared sum: each rank adds all ranks' terms for its shard, in order of rank."""
        if self._term is None:
            return
        assert self._peers is not None
        term, self._term = self._term, None
        for part in self._peers.exchange(term).view(self._peers.world, -1):
            self.sum.add_(part.to(self.sum.device))
