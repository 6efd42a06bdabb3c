"""Ranks that share a saliency pass: the bits of one process, at any world size; a rank that fails stops them all."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import pico
import speft_core as sc
from speft_core.saliency.peers import PeerFailed, Peers

Shared = dict[int, Mapping[str, torch.Tensor]]


class ThreadPeers(Peers):
    """Ranks that are threads: the same rounds, with tensors handed over in memory."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, shared: Shared, notes: dict[int, Any]) -> None:
        super().__init__(rank, world)
        self.barrier, self.shared, self.notes = barrier, shared, notes

    def combine(self, sums: Mapping[str, torch.Tensor], present: int) -> None:
        self.shared[self.rank] = sums
        self._agree(None)
        if self.rank == 0:
            for other in range(1, present):
                for name, total in sums.items():
                    total.add_(self.shared[other][name])
                    self.shared[other][name].zero_()
        self.barrier.wait(60)

    def _gather(self, message: Any) -> list[Any]:
        self.notes[self.rank] = message
        self.barrier.wait(60)
        notes = [self.notes[rank] for rank in range(self.world)]
        self.barrier.wait(60)
        return notes


def batches(model: Any, count: int = 7) -> list[dict[str, torch.Tensor]]:
    """The last one is short, as a data set's is."""
    return [pico.batch(model, rows=3 if n < count - 1 else 1, length=9, seed=n) for n in range(count)]


def together(world: int, metric: str, **more: Any) -> list[Any]:
    """What find_mask gives on each rank; an exception where it raises one."""
    barrier, shared, notes, found = threading.Barrier(world), Shared(), dict[int, Any](), [None] * world

    models = [pico.llama() for _ in range(world)]  # made here: the generator that draws their weights is shared by threads

    def work(rank: int) -> None:
        model = models[rank]
        peers = ThreadPeers(rank, world, barrier, shared, notes)
        try:
            given = batches(model)
            if more.get("fails") == rank:
                given[world + rank]["labels"] = torch.full_like(given[world + rank]["labels"], -100)  # a loss of 0 / 0
            rest = {k: v for k, v in more.items() if k != "fails"}
            found[rank] = sc.find_mask(model, given, metric, sc.Budget(k=150), peers=peers, **rest)  # type: ignore[call-overload]
            peers.done()
        except PeerFailed as error:
            found[rank] = error  # type: ignore[call-overload]
        except Exception as error:
            peers.failed(error)
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("metric", ["gradient", "snip", "fisher", "absolute_gradient", "wanda"])
def test_masks_are_the_same_at_any_world_size(metric: str, world: int) -> None:
    """8 ranks for 7 batches: one of them has none, and still takes part."""
    model = pico.llama()
    alone = sc.find_mask(model, batches(model), metric, sc.Budget(k=150))
    found = together(world, metric)
    assert found[0] == alone and found[0].made == alone.made and alone.nnz == 150
    assert all(mask.nnz == 0 for mask in found[1:])


def test_several_passes_are_shared_too() -> None:
    model = pico.llama()
    alone = sc.find_mask(model, batches(model), "gradient", sc.Budget(k=150))
    assert together(2, "gradient", memory_limit=8_000)[0] == alone


def test_what_cannot_be_shared_runs_on_rank_0() -> None:
    model = pico.llama()
    for metric in ("grasp", "magnitude"):
        alone = sc.find_mask(model, batches(model), metric, sc.Budget(k=150))
        assert together(2, metric)[0] == alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_stops_all(rank: int) -> None:
    found = together(2, "gradient", fails=rank)
    assert "must be finite" in str(found[rank]) and not isinstance(found[rank], PeerFailed)
    assert isinstance(found[1 - rank], PeerFailed) and f"rank {rank} stopped" in str(found[1 - rank])
