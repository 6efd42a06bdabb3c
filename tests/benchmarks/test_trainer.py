"""benchmarks/trainer.py does what it says, on a CPU and a narrow model of one layer; its figures need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pico_tokenizers

TRAINER = Path(__file__).parents[2] / "benchmarks" / "trainer.py"


def test_a_run_from_an_empty_folder_to_its_row(tmp_path: Path) -> None:
    pico_tokenizers.byte_level().save_pretrained(tmp_path / "tokenizer")
    words = ["--layers", "1", "--narrow", "56", "--steps", "4", "--runs", "python", "--folder", str(tmp_path / "out")]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--set", "data.max_length=192", "data.train_size=40"]
    words += ["train.global_batch_size=2", "train.learning_rate=1e-2", "adapter.calibration_examples=4", "data.test_size=4"]
    done = subprocess.run([sys.executable, str(TRAINER), *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"run"'))
    lora = 2 * (64 + 56) + 2 * (64 + 8)  # rank 64 // 56 on q and o for 28 heads of 2, k and v for 4
    assert (row["run"], row["trained"]) == ("python", lora)
    assert min(row[key] for key in ("ms a step", "peak", "mask s", "train s", "all s", "adapter MB")) > 0
    assert row["loss before"] > row["loss"] > 0
