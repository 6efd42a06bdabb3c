"""What two ranks say when one of them, or both, cannot go on."""

from __future__ import annotations

import time
from pathlib import Path

from pico_run import make_config, make_model
from two_ranks import LIGHT, NEEDS_LAUNCHER, RUN, launch, merged

pytestmark = NEEDS_LAUNCHER


def test_one_rank_out_of_memory_at_stage_3_leaves_with_advice(tmp_path: Path) -> None:
    """It plans alone, while the other one waits in a collective: a plan that made collectives would wait for that one."""
    sections = merged(LIGHT, {"deepspeed": {"zero_stage": 3}, "adapter": {"metric": "magnitude"}, "train": {"max_steps": 50}})
    config = make_config(tmp_path / "c.yaml", make_model(tmp_path / "model"), tmp_path / "run", **sections)
    done = launch(Path(__file__).parent / "failing_rank.py", str(config), str(tmp_path), "CUDA out of memory")
    ended = time.time()
    assert done.returncode != 0
    told = "rank 1: error: training ran out of memory; by the plan, set train.per_device_train_batch_size=2 (now 4)"
    assert told in done.stderr, done.stderr[-3000:]
    assert ended - float((tmp_path / "failed").read_text()) < 60


def test_a_mistake_in_the_config_is_told_once(tmp_path: Path) -> None:
    config = make_config(tmp_path / "c.yaml", make_model(tmp_path / "model"), tmp_path / "run")
    done = launch(RUN, str(config), "train.max_stesp=3")
    assert done.returncode == 2
    assert done.stderr.count("train.max_stesp: unknown key") == 1, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()
