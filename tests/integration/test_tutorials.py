"""The tutorials, word for word: every block that a person would type runs, in order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def typed(page: str, folder: Path, limit: int) -> str:
    """Run the page's shell blocks as one session beside links to what a clone has; returns what it printed."""
    for name in ("configs", "packages"):
        (folder / name).symlink_to(ROOT / name)
    session = "set -eo pipefail\n" + "\n".join(blocks(page, "bash"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", session], cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def test_the_library_tutorial(tmp_path: Path) -> None:
    program = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(blocks("tutorial-library.md", "python"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, last = (float(x) for x in re.search(r"loss ([\d.]+) -> ([\d.]+)", run.stdout).groups())  # type: ignore[union-attr]
    assert last < 0.7 * first
    base, learned = (float(re.search(rf"^{name} ([\d.]+)$", run.stdout, re.M)[1]) for name in ("None", "learned"))  # type: ignore[index]
    applied = float(re.search(r"applied: ([\d.]+)", run.stdout)[1])  # type: ignore[index]
    assert learned == applied < 0.7 * base


@pytest.mark.real
def test_the_tutorial(tmp_path: Path) -> None:
    out = typed("tutorial.md", tmp_path, 1500)
    for run in ("feeling", "topic"):
        found = json.loads((tmp_path / f"runs/{run}/results.json").read_text())
        assert found["adapted"]["accuracy"] > max(0.85, found["base"]["accuracy"])
    assert "routed, pleased: [1, 0] travel: [0, 1]" in out and "one forward, pleased: [" in out
    plain = float(re.search(r"plain Transformers: ([\d.]+)", out)[1])  # type: ignore[index]
    assert plain == pytest.approx(
        json.loads((tmp_path / "runs/feeling/results.json").read_text())["adapted"]["accuracy"], abs=0.002
    )
    assert len(list((tmp_path / "pictures").iterdir())) >= 1


@pytest.mark.real
@pytest.mark.distributed
def test_the_cluster_tutorial(tmp_path: Path) -> None:
    typed("tutorial-cluster.md", tmp_path, 1500)
    losses = {}
    for run in ("one", "two"):
        found = json.loads((tmp_path / f"runs/{run}/results.json").read_text())
        losses[run] = [row["loss"] for row in found["history"] if "loss" in row]
        assert found["steps"] == 6
    assert losses["one"] == pytest.approx(losses["two"], abs=0.03)  # the encoder's dropout is drawn by each rank


def test_no_tutorial_block_is_left_out() -> None:
    """Only the installation stands in a block without a language."""
    for page in ("tutorial.md", "tutorial-library.md", "tutorial-cluster.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)$", text, flags=re.M)[::2]
        assert fences and set(fences) <= {"bash", "python", ""}
        assert len([f for f in fences if not f]) <= 2, page
