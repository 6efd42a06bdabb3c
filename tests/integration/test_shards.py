"""Models in shards on two gloo ranks: loaded, scored, attached, evaluated and saved with the bits of whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from two_ranks import NEEDS_LAUNCHER, launch

pytestmark = NEEDS_LAUNCHER
CHECKS = ("loads", "masks", "forwards", "gradients", "adapters", "refusals")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """(what has passed, in order; what the ranks said)."""
    ran = launch(Path(__file__).parent / "in_shards.py", str(tmp_path_factory.mktemp("shards")))
    return [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("passed ")], ran.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_in_shards_as_whole(done: tuple[list[str], str], check: str) -> None:
    """The checks are in in_shards.py; each states its property."""
    passed, said = done
    assert check in passed, said[-4000:]
