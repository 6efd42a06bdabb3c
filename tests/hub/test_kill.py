"""kill -9 at random moments of push and pull: never half an adapter that loads, and the next try succeeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hub.helpers import pico_adapter
from hub.loopback import LoopbackHub
from speft_core import SparseAdapter, UserError
from speft_hub import parse, pull, push
from speft_hub.names import CONFIG, WEIGHTS

# A child that imports first, says so, waits for a line and then works, so that the delay before the kill falls into the work.
CHILD = """
import sys, speft_hub
print("ready", flush=True)
sys.stdin.readline()
for round in range(200):
    if sys.argv[1] == "pull":
        speft_hub.pull(sys.argv[2], sys.argv[3], force=True)
        import pathlib; pathlib.Path(sys.argv[3], "README.md").write_text("changed, so that the next round fetches again")
    else:
        import pathlib; pathlib.Path(sys.argv[3], "training_config.yaml").write_text(f"round: {round}-{sys.argv[4]}")
        speft_hub.push(sys.argv[3], sys.argv[2])
"""


def killed(*arguments: str, delay: float) -> None:
    """Start the child and kill it `delay` seconds into its work."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdin and child.stdout and child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    time.sleep(delay)
    assert child.poll() is None, child.stderr.read() if child.stderr else ""
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_kill_at_twenty_random_moments(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    address = f"file://{tmp_path}/reg/alice/sst2"
    if place == "hub":
        hub: LoopbackHub = request.getfixturevalue("hub")
        address = "alice/sst2"
    whole = {}
    for seed in (0, 1):
        pico_adapter(seed=seed, nnz=100).save(tmp_path / f"a{seed}")
        whole[seed] = (tmp_path / f"a{seed}" / WEIGHTS).read_bytes()
    push(tmp_path / "a0", address)
    if place == "hub":
        hub.inject("slow", "/resolve/", seconds=0.003)
        hub.inject("slow", "/lfs/get/", seconds=0.01)
    moments = random.Random(7)
    target = tmp_path / "room" / "copy"
    reference = parse(address)
    for i in range(10):
        killed("pull", address, str(target), delay=moments.uniform(0.02, 0.6))
        if target.exists():
            loaded = SparseAdapter.load(target)  # whole, never half
            assert (target / WEIGHTS).read_bytes() in whole.values() and loaded.nnz == 200
        pulled = pull(address, target, force=True)
        assert (pulled.path / WEIGHTS).read_bytes() in whole.values()
        assert not [p for p in target.parent.iterdir() if ".partial" in p.name]
        source = tmp_path / f"a{i % 2}"
        killed("push", address, str(source), str(i), delay=moments.uniform(0.02, 0.6))
        head = reference.registry.resolve(reference.repo, "main")
        check = pull(f"{address}@{head}", tmp_path / "check", force=True)  # the branch is at a whole commit
        assert (check.path / WEIGHTS).read_bytes() in whole.values()
        push(source, address)
        assert (pull(address, tmp_path / "check", force=True).path / WEIGHTS).read_bytes() == whole[i % 2]
    if place == "folder":
        assert not list((tmp_path / "reg").rglob("*.partial"))
    head = reference.registry.resolve(reference.repo, "main")
    assert len(reference.registry.history(reference.repo, head)) > 5


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_half_an_adapter_does_not_load(adapter_dir: Path, missing: str) -> None:
    (adapter_dir / missing).unlink()
    with pytest.raises(UserError, match="missing"):
        SparseAdapter.load(adapter_dir)


def test_what_a_killed_pull_left_is_swept_or_brought_back(adapter_dir: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/reg/alice/sst2"
    push(adapter_dir, address)
    target = tmp_path / "copy"
    pull(address, target)
    # Killed between "the old one is renamed away" and "the new one takes its name".
    target.rename(tmp_path / ".copy.abc12_yz.partial.old")
    (tmp_path / ".copy.abc12_yz.partial").mkdir()
    assert not pull(address, target).fetched  # brought back, and it was the right one
    assert not [p for p in tmp_path.iterdir() if ".partial" in p.name]


def test_what_belongs_to_another_name_is_left_alone(adapter_dir: Path, tmp_path: Path) -> None:
    """`llama-3.1` begins like `llama-3`: another pull may be at work on it, or its only whole copy may lie there."""
    address = f"file://{tmp_path}/reg/alice/llama"
    push(adapter_dir, address)
    others = [tmp_path / ".llama-3.1.abc12_yz.partial", tmp_path / ".llama-3.1.abc12_yz.partial.old"]
    for other in others:
        other.mkdir()
    (others[1] / "whole").write_text("the only copy")
    assert pull(address, tmp_path / "llama-3").fetched
    assert all(other.is_dir() for other in others) and (others[1] / "whole").is_file()
    dead = tmp_path / ".a[1].abc12_yz.partial"
    dead.mkdir()
    pull(address, tmp_path / "a[1]")
    assert not dead.exists()


def test_a_pull_that_waited_too_long_says_so(adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"file://{tmp_path}/reg/alice/sst2"
    push(adapter_dir, address)
    monkeypatch.setattr("speft_hub.pulling.LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".copy.lock"), pytest.raises(UserError, match="another pull into"):
        pull(address, tmp_path / "copy")
