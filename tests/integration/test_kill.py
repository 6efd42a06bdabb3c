"""SIGKILL for all ranks at random moments and in mid-save: the same command ends with the bits of a run left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pico_run import make_config, make_model
from two_ranks import LIGHT, NEEDS_LAUNCHER, launch, merged

SERIES = Path(__file__).parent / "kill_series.py"
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
pytestmark = NEEDS_LAUNCHER


@pytest.mark.parametrize(
    ("stage", "moments", "seed"),
    [(2, 2, 0), *(pytest.param(stage, 10, seed, marks=pytest.mark.real) for stage in (2, 3) for seed in (1, 2))],
)
def test_a_killed_run_ends_as_one_left_alone(tmp_path: Path, stage: int, moments: int, seed: int) -> None:
    sections = merged(LIGHT, {"deepspeed": {"zero_stage": stage}, "train": {"max_steps": 8, "save_steps": 2}})
    if stage == 3:
        sections["deepspeed"]["config"] = SHARDED
    config = make_config(tmp_path / "c.yaml", make_model(tmp_path / "model"), tmp_path / "unused", **sections)
    command = [sys.executable, str(SERIES), str(config), str(tmp_path), "--moments", str(moments), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == moments
    assert all(row["equal"] for row in rows), rows
    assert any(set(row["killed"]) != {0} for row in rows)  # the run was not over each time
    in_save = [row for row in rows if row["moment"].startswith("in save")]
    assert in_save and all(min(row["killed"]) < 0 for row in in_save)


def test_a_rank_that_dies_ends_the_job_within_a_minute_and_its_error_is_shown(tmp_path: Path) -> None:
    """The other rank waits for it in a reduction; the launcher ends it."""
    sections = merged(LIGHT, {"deepspeed": {"zero_stage": 2}, "adapter": {"metric": "magnitude"}, "train": {"max_steps": 50}})
    config = make_config(tmp_path / "c.yaml", make_model(tmp_path / "model"), tmp_path / "run", **sections)
    done = launch(Path(__file__).parent / "failing_rank.py", str(config), str(tmp_path))
    ended = time.time()
    assert done.returncode != 0
    assert "RuntimeError: the loss of rank 1 is broken" in done.stderr
    assert ended - float((tmp_path / "failed").read_text()) < 60
    assert not (tmp_path / "run" / "adapter").exists()
