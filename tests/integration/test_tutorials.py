"""The tutorials, word for word: every block that a person would type runs, in order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from integration import pages
from integration.pages import ROOT
from integration.warm import warm_path


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return pages.blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), language)


def typed(session: str, folder: Path, limit: int, environment: Mapping[str, str] = os.environ) -> str:
    """Run a page's shell blocks as one session; returns what it printed."""
    session = "set -eo pipefail\n" + session
    run = subprocess.run(["bash", "-c", session], cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def clone_like(folder: Path) -> dict[str, str]:
    """Links to what a clone has, and an environment in which `. .venv/bin/activate` has been done."""
    for name in ("configs", "packages"):
        (folder / name).symlink_to(ROOT / name)
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


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


def check_the_story(folder: Path, out: str) -> None:
    """What the tutorial's commands left and said is what its text promises."""
    for run in ("feeling", "topic"):
        found = json.loads((folder / f"runs/{run}/results.json").read_text())
        assert found["adapted"]["accuracy"] > max(0.85, found["base"]["accuracy"])
        own, merged = (float(x) for x in re.search(rf"^{run}: own adapter ([\d.]+), merged body ([\d.]+)$", out, re.M).groups())  # type: ignore[union-attr]
        assert own == pytest.approx(found["adapted"]["accuracy"], abs=0.002) and 0.4 < merged <= 1
    lora = json.loads((folder / "runs/feeling-lora/results.json").read_text())
    mine = json.loads((folder / "runs/feeling/results.json").read_text())
    assert 0 < lora["trainable_parameters"] <= mine["trainable_parameters"] and "feeling-lora accuracy" in out
    plain = float(re.search(r"plain Transformers: ([\d.]+)", out)[1])  # type: ignore[index]
    assert plain == pytest.approx(mine["adapted"]["accuracy"], abs=0.002)
    assert {path.name for path in (folder / "pictures").iterdir()} >= {"density.png", "inspect.json"}
    for adapter in ("adapters/feeling", "adapters/merged", "adapters/both"):
        assert (folder / adapter / "adapter_model.safetensors").is_file()
    assert "speft" not in json.dumps(json.loads((folder / "plain/config.json").read_text()))


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One session, word for word, on the real bundled encoder; only the installation is left out, and programs start warm."""
    clone_like(tmp_path)
    with warm_path(tmp_path_factory.mktemp("warm")) as environment:
        check_the_story(tmp_path, typed("\n".join(blocks("tutorial.md", "bash")), tmp_path, 900, environment))


@pytest.mark.real
def test_the_tutorial_from_a_clone(tmp_path: Path) -> None:
    """The same with its first block: a clone, `make install` (the packages' downloads come from pip's cache), and programs started cold."""
    (install,) = blocks("tutorial.md", "")
    assert "<this repository>" in install
    session = install.replace("<this repository>", str(ROOT)) + "\n".join(blocks("tutorial.md", "bash"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    check_the_story(tmp_path / "speft", typed(session, tmp_path, 3000, kept))


@pytest.mark.real
@pytest.mark.distributed
def test_the_cluster_tutorial(tmp_path: Path) -> None:
    typed("\n".join(blocks("tutorial-cluster.md", "bash")), tmp_path, 1500, clone_like(tmp_path))
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
