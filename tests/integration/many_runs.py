"""Several runs in the ranks of one launch: starting a rank takes longer than a run on a pico model.

deepspeed --num_gpus 2 many_runs.py RUNS.json, where RUNS.json lists (config, overrides). Prints one JSON line a run from
rank 0: its exit code, a digest of the weights that each rank ended with, and of the random masks that each draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState, GradientState, PartialState

from pico_run import random_masks_digest
from speft_core.partitioned import whole
from speft_train import cli, engine, steps


def weights_digest(model: Any) -> str:
    """Hash of every parameter's bits, values and merged weights alike."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        with whole([p]):
            found.update(name.encode() + p.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Run all, in the process group of the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("runs", type=Path)
    runs = json.loads(parser.parse_args().runs.read_text())
    engine.stop = lambda ranks: None  # the next run needs the process group
    ends: list[list[str]] = []
    drawn: list[list[str]] = []
    train = steps.train

    def watched(run: Any) -> Any:
        result = train(run)
        ends.append(run.ranks.gather(weights_digest(run.attached.model)))
        drawn.append(run.ranks.gather(random_masks_digest(backwards=run.ranks.rank % 2 == 1)))
        return result

    from speft_train import stages

    stages.STAGES = tuple(stages.Stage(**{**vars(s), "work": watched if s.name == "train" else s.work}) for s in stages.STAGES)
    rank = engine.launched_ranks()[0]
    for config, overrides in runs:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        ends.clear()
        drawn.clear()
        code = cli.guarded(lambda c=config, o=overrides: cli.execute(Path(c), o, dry_run=False))
        if rank == 0:
            found = {"code": code, "digests": ends[0] if ends else [], "drawn": drawn[0] if drawn else []}
            print("RUN " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
