"""At stage 3 no rank ever holds the whole model: measured over a whole run, stage by stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from two_ranks import NEEDS_LAUNCHER, ROOT

pytestmark = NEEDS_LAUNCHER
STAGES = ["load", "base", "mask", "attach", "train", "save", "evaluate", "report"]


@pytest.mark.real
@pytest.mark.parametrize("method", ["sparse", "lora"])
def test_no_rank_holds_the_whole_model(tmp_path: Path, method: str) -> None:
    """Each holds half of it, one layer, and what little is trained. A whole one would be measured: the halves are."""
    file = tmp_path / "peaks.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "zero3_memory.py"), "--method", method, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert file.is_file(), done.stderr[-3000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    size, ranks = found["model"], found["ranks"]
    assert size > 400e6 and len(ranks) == 2
    for peaks in ranks:
        assert list(peaks) == [stage for stage in STAGES if method == "sparse" or stage != "mask"]
        assert all(0.45 * size < peak < 0.85 * size for stage, peak in peaks.items() if stage != "report"), peaks
