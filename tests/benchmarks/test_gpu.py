"""benchmarks/gpu.py does what it says, on a CPU and one small layer; its figures need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_every_method_is_put_on_timed_and_taken_off(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--model", "facebook/opt-125m", "--layers", "1", "--tokens", "1x8", "--dtype", "fp32"]
    words += ["--rank", "2", "1", "--rounds", "1", "--methods", "speft", "LoRA", "full", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(GPU), *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    names = ["floor", "speft gradient", "speft gradient local", "speft random", "LoRA", "LoRA (bf16)", "full (SGD)"]
    assert [(row["rank"], row["method"]) for row in found["rows"]] == [(rank, name) for rank in (2, 1) for name in names]
    trained = {(row["rank"], row["method"]): row["trained"] for row in found["rows"]}
    for rank in (2, 1):  # q, k, v, out: 768 x 768; fc1, fc2: 3072 x 768
        k = rank * (4 * 2 * 768 + 2 * (768 + 3072))
        assert {trained[rank, name] for name in names[1:6]} == {k} and trained[rank, "floor"] == 0
    assert all(row["ms"] > 0 and row["over floor"] > 0 for row in found["rows"])
