"""The settings that every test relies on are in force."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.distributed
def test_tests_that_start_ranks_share_a_worker(request: pytest.FixtureRequest) -> None:
    """xdist marks a test of a group by a suffix of its name; a pytest that ignores the suffix spreads the group."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@distributed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", f"{__file__}::{request.node.name}"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
