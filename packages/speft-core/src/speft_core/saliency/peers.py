"""A saliency pass shared by several processes, with the bits of one.

In each round every rank scores one batch. Rank 0 adds its own to the sums, then the others' in order of rank, tensor by tensor:
the order of additions is that of one process going over the batches, so the sums are the same at any world size. The others
hold one batch's gradient at a time; rank 0 holds the sums and one tensor more. Parameters that a batch adds to more than once
(tied weights, scores of single examples outside linear layers) agree to rounding, not to the bit.

Weights that lie in shards (ZeRO-3) make the ranks go through every layer together. Then each layer's gradients are handed out
as soon as they are there: each rank adds up its own shard, in the same order, and holds one layer's gradient at a time. A rank
without a batch in the last round goes along with a batch that does not count.

A rank that fails says so in the next round, and all of them stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import UserError


class PeerFailed(UserError):
    """Another rank stopped, and has told the user why."""


class Peers:
    """One rank of `world`. `objects`: a gloo group, for flags and for sums in host memory; `tensors`: one for tensors on the
    model's device.
    """

    def __init__(self, rank: int, world: int, objects: Any = None, tensors: Any = None) -> None:
        self.rank, self.world, self.objects, self.tensors = rank, world, objects, tensors
        self.idle = False  #: this rank's present batch does not count

    def combine(self, sums: Mapping[str, torch.Tensor], present: int) -> None:
        """End a round in which the ranks below `present` have added a batch: rank 0 adds theirs, they start at zero again."""
        self._agree(None)
        import torch.distributed as dist

        if self.rank >= present:
            for total in sums.values():
                total.zero_()
            return
        for total in sums.values():
            group = self.objects if total.device.type == "cpu" else self.tensors  # NCCL knows no host memory
            if self.rank:
                dist.send(total, 0, group=group)
                total.zero_()
                continue
            term = torch.empty_like(total)
            for other in range(1, present):
                dist.recv(term, other, group=group)
                total.add_(term)

    def exchange(self, term: torch.Tensor) -> torch.Tensor:
        """Of every rank's flat term [world · n] the n entries of this rank's shard, [world · n] in order of rank."""
        import torch.distributed as dist

        if self.idle:
            term.zero_()
        found = torch.empty_like(term)
        dist.all_to_all_single(found, term, group=self.tensors)
        return found

    def told_by(self, owner: int, make: Callable[[], torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
        """What `make` gives on rank `owner`, on all ranks; of the shape, dtype and device of `empty`."""
        import torch.distributed as dist

        if self.rank == owner:
            empty.copy_(make())
        dist.broadcast(empty, owner, group=self.tensors)
        return empty

    def first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        return self._agree([value])[0][0]

    def least(self, value: int | None) -> int | None:
        """The smallest of all ranks' values, on all ranks; None counts for nothing."""
        return min((v for (v,) in self._agree([value]) if v is not None), default=None)

    def union(self, names: set[str]) -> set[str]:
        """All ranks' names, on all ranks."""
        return {name for (few,) in self._agree([sorted(names)]) for name in few}

    def agree(self, message: str | None) -> None:
        """Go on together: UserError with this rank's `message`, PeerFailed with another's."""
        self._agree(message)
        if message is not None:
            raise UserError(message)

    def done(self) -> None:
        """The pass is over here, its mask included; PeerFailed when it is not for another rank."""
        self._agree(None)

    def failed(self, error: BaseException) -> bool:
        """Tell the others, who wait in a round or at the end; whether rank 0 failed too. Not for a PeerFailed, which all get."""
        try:
            return isinstance(self._gather(f"{type(error).__name__}: {error}")[0], str)
        except RuntimeError:  # the others are gone
            return self.rank == 0

    def _agree(self, message: Any) -> list[Any]:
        """Every rank's message; PeerFailed when another's is a text, which says why it stopped."""
        found = self._gather(message)
        for rank, text in enumerate(found):
            if isinstance(text, str) and rank != self.rank:
                raise PeerFailed(f"rank {rank} stopped: {text}")
        return found

    def _gather(self, message: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, message, group=self.objects)
        return found
