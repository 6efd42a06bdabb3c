"""The processes of one run: who we are, and the few things that they must agree on.

Objects travel over a gloo group of their own, so that agreeing on a flag never waits for an accelerator. With one
process every function is trivial and torch.distributed is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from speft_core.errors import UserError

T = TypeVar("T")


# What gloo says when a process at the other end has ended: it gives no error of its own to these.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class PeerError(UserError):
    """Another rank failed and has told the user; this one leaves with this."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = field(default=None, repr=False)  #: gloo process group for objects and flags

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes the shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _peers_that_leave():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def max(self, value: int) -> int:
        """The largest `value` of any rank, on every rank."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        shared = torch.tensor([value])
        with _peers_that_leave():
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0 works while the others wait; all get the result. If it fails there, all of them stop."""
        if self.world == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                box[0] = work()
            except BaseException as error:
                failure, box[1] = error, f"{type(error).__name__}: {error}"
        try:
            with _peers_that_leave():
                dist.broadcast_object_list(box, src=0, group=self.group)
        finally:
            if failure is not None:  # also when the others are gone already
                raise failure
        if box[1] is not None:
            raise PeerError(f"rank 0 stopped: {box[1]}")
        result: T = box[0]
        return result

    def share(self, items: list[T]) -> list[T]:
        """This rank's part of a list that all ranks hold: every `world`-th item."""
        return items[self.rank :: self.world]


@contextmanager
def _peers_that_leave() -> Iterator[None]:
    """PeerError instead of gloo's own when another process ended while this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in GONE):
            raise
        raise PeerError("another rank ended before this one; what it said tells why") from error
