"""What the processes of a run agree on, on real ranks, and what one says when another is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speft_train.ranks import PeerError, Ranks

PROGRAM = """
import os, sys
import torch.distributed as dist
from speft_train.ranks import PeerError, Ranks

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
ranks = Ranks(rank, 2, rank)
print(ranks.max(7 * rank), ranks.gather(str(rank)), ranks.on_main(lambda: "from 0"), ranks.share([0, 1, 2]))
ranks.barrier()
if rank == 1:
    os._exit(9)
for work in (lambda: ranks.gather(1), lambda: ranks.max(1), ranks.barrier, lambda: ranks.on_main(lambda: 1)):
    try:
        work()
        print("went on")
    except PeerError as error:
        print(error)
os._exit(0)
"""


@pytest.mark.distributed
def test_two_ranks_agree_and_one_hears_that_the_other_is_gone(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-uc", PROGRAM, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=280)[0].splitlines() for rank in ranks]
    assert said[0][0] == "7 ['0', '1'] from 0 [0, 2]"
    assert said[1] == ["7 ['0', '1'] from 0 [1]"]
    assert said[0][1:] == ["another rank ended before this one; what it said tells why"] * 4


def test_one_process_asks_nobody() -> None:
    ranks = Ranks()
    assert (ranks.max(3), ranks.gather(4), ranks.on_main(lambda: 5), ranks.share([6, 7])) == (3, [4], 5, [6, 7])
    with pytest.raises(PeerError, match="mine"):
        ranks.on_main(lambda: (_ for _ in ()).throw(PeerError("mine")))
