"""A run in one process needs no DeepSpeed, as on Windows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pico_run import make_config, make_model

PROGRAM = """
import sys
sys.modules["deepspeed"] = None  # an import of it, and a look for it, find nothing
from speft_train import cli
cli.main()
"""


def test_training_and_saving_work_where_it_is_not_installed(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run.yaml", make_model(tmp_path / "model"), tmp_path / "run", evaluate={"enabled": False})
    words = [sys.executable, "-c", PROGRAM, "run", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert found["steps"] == 6 and found["adapter_bytes"] > 0
