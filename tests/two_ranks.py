"""Runs on two gloo ranks started by the deepspeed launcher, several in one launch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speft_train import cli, results
from speft_train.folder import RunFolder

ROOT = Path(__file__).parents[1]
RUN = ROOT / "packages" / "speft-train" / "run.py"
MANY = ROOT / "tests" / "integration" / "many_runs.py"
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
LIGHT: dict[str, Any] = {"evaluate": {"enabled": False}}
NEEDS_LAUNCHER = [
    pytest.mark.distributed,
    pytest.mark.skipif(not (Path(sys.executable).parent / "deepspeed").exists(), reason="no launcher"),
]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(script: Path, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Start two ranks and wait for them."""
    command = [*LAUNCHER, free_port(), str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def run_all(folder: Path, runs: list[list[Any]]) -> Path:
    """Run (config, overrides) after (config, overrides) in one launch; what it said is in `folder`."""
    (folder / "runs.json").write_text(json.dumps(runs))
    done = launch(MANY, str(folder / "runs.json"))
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def end_of(ran: Path, number: int) -> dict[str, Any]:
    """What the run of that number printed at its end. A crash of one run leaves those before it."""
    lines = (ran / "stdout").read_text().splitlines()
    found: list[dict[str, Any]] = [json.loads(line.removeprefix("RUN ")) for line in lines if line.startswith("RUN ")]
    assert len(found) > number, (ran / "stderr").read_text()[-3000:]
    return found[number]


def as_one_process(ran: Path, name: str, number: int) -> dict[str, Any]:
    """Train the run of that name and number in this process too: losses within 1e-5 at each step, equal bits on both ranks."""
    end = end_of(ran, number)
    assert end["code"] == 0, (ran / "stderr").read_text()[-3000:]
    assert len(end["digests"]) == 2 and len(set(end["digests"])) == 1
    cli.execute(ran / f"{name}-1.yaml", [], dry_run=False)
    one, two = losses(ran / "one" / name), losses(ran / "two" / name)
    assert len(one) == 6 and one[0] != one[-1]
    assert two == pytest.approx(one, abs=1e-5)
    return end


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    return [row["loss"] for row in results.read(RunFolder(folder))["history"] if "loss" in row]


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Sections over sections, key by key."""
    made: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            made[name] = {**made.get(name, {}), **section}
    return made
