"""Fixtures that tests of runs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from speft_train import stages


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that did something."""
    seen: list[str] = []

    def watching(stage: stages.Stage) -> Callable[..., Any]:
        def work(run: Any) -> Any:
            seen.append(stage.name)
            return stage.work(run)

        return work

    watched = tuple(stages.Stage(**{**vars(stage), "work": watching(stage)}) for stage in stages.STAGES)
    monkeypatch.setattr(stages, "STAGES", watched)
    return seen
