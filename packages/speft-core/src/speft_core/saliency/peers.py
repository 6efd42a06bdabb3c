"""A saliency pass shared by several processes, with the bits of one.

In each round every rank scores one batch. Rank 0 adds its own to the sums, then the others' in order of rank, tensor by tensor:
the order of additions is that of one process going over the batches, so the sums are the same at any world size. The others
hold one batch's gradient at a time; rank 0 holds the sums and one tensor more. Parameters that a batch adds to more than once
(tied weights, scores of single examples outside linear layers) agree to rounding, not to the bit.

A rank that fails says so in the next round, and all of them stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError


class PeerFailed(UserError):
    """Another rank stopped, and has told the user why."""


class Peers:
    """One rank of `world`. `objects`: a process group for flags; `tensors`: one for tensors on the accumulators' device."""

    def __init__(self, rank: int, world: int, objects: Any = None, tensors: Any = None) -> None:
        self.rank, self.world, self.objects, self.tensors = rank, world, objects, tensors

    def combine(self, sums: Mapping[str, torch.Tensor], present: int) -> None:
        """End a round in which the ranks below `present` have added a batch: rank 0 adds theirs, they start at zero again."""
        self._agree(None)
        import torch.distributed as dist

        if self.rank >= present:
            return
        for total in sums.values():
            if self.rank:
                dist.send(total, 0, group=self.tensors)
                total.zero_()
                continue
            term = torch.empty_like(total)
            for other in range(1, present):
                dist.recv(term, other, group=self.tensors)
                total.add_(term)

    def done(self) -> None:
        """The pass is over here, its mask included; PeerFailed when it is not for another rank."""
        self._agree(None)

    def failed(self, error: BaseException) -> bool:
        """Tell the others, who wait in a round or at the end; whether rank 0 failed too. Not for a PeerFailed, which all get."""
        try:
            return self._gather(f"{type(error).__name__}: {error}")[0] is not None
        except RuntimeError:  # the others are gone
            return self.rank == 0

    def _agree(self, message: str | None) -> None:
        for rank, text in enumerate(self._gather(message)):
            if text is not None and rank != self.rank:
                raise PeerFailed(f"rank {rank} stopped: {text}")

    def _gather(self, message: str | None) -> list[str | None]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, message, group=self.objects)
        return found
