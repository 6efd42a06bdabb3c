"""Peers on real ranks: two processes of torch.distributed give the sums of one, and each hears of the other's failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORLD = 2
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from speft_core.saliency.peers import PeerFailed, Peers

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
peers = Peers(rank, 2)
draw = torch.Generator().manual_seed(0)
sums = {name: torch.zeros(5) for name in ("a", "b")}
for present in (2, 2, 1):  # in the last round rank 1 has no batch
    terms = [{name: torch.randn(5, generator=draw) for name in sums} for _ in range(present)]
    if rank < present:
        for name, total in sums.items():
            total.add_(terms[rank][name])
    peers.combine(sums, present)
peers.done()
torch.save(sums, f"{folder}/{rank}.pt")
try:
    if rank == 1:
        print(peers.failed(ValueError("no loss")))
    else:
        peers.done()
except PeerFailed as error:
    print(error)
if rank == 0:
    print(peers.failed(KeyError("lost")))
else:
    try:
        peers.combine(sums, 2)
    except PeerFailed as error:
        print(error)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_ranks_give_the_sums_of_one_and_hear_of_failures(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    said = [rank.communicate(timeout=280)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    draw = torch.Generator().manual_seed(0)
    expected = {name: torch.zeros(5) for name in ("a", "b")}
    for present in (2, 2, 1):  # one process going over the batches
        for term in [{name: torch.randn(5, generator=draw) for name in expected} for _ in range(present)]:
            for name, total in expected.items():
                total.add_(term[name])
    sums = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert all(torch.equal(sums[0][name], total) for name, total in expected.items())
    assert all(not total.any() for total in sums[1].values())  # handed over, and begun again
    assert said[0][:2] == ["rank 1 stopped: ValueError: no loss", "True"]
    assert said[1][:2] == ["False", "rank 0 stopped: KeyError: 'lost'"]
