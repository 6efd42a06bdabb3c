"""The settings that every test relies on are in force."""

from __future__ import annotations

import pytest


@pytest.mark.distributed
def test_tests_that_start_ranks_share_a_worker(request: pytest.FixtureRequest) -> None:
    """xdist marks a test of a group by a suffix of its name; a pytest that ignores the suffix spreads the group."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("without workers there is nothing to share")
    assert request.node.nodeid.endswith("@distributed")
