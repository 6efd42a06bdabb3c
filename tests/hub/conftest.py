"""Fixtures of the hub tests: a loopback Hub that the real client talks to, and small adapters to publish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# huggingface_hub reads these once, at import; the fixture below sets what was read when something imported it before us.
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1,localhost")

import pytest
from huggingface_hub import constants

from hub.helpers import pico_adapter
from hub.loopback import LoopbackHub

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}


@pytest.fixture(scope="session")
def _server() -> Iterator[LoopbackHub]:
    with LoopbackHub(TOKENS) as hub:
        yield hub


@pytest.fixture
def hub(_server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The loopback Hub, empty, with alice logged in."""
    _server.reset()
    home = tmp_path / "hf_home"
    environment = {"HF_ENDPOINT": _server.url, "HF_HOME": str(home), "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", _server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr("speft_hub.pulling.RETRY_SECONDS", 0.0)
    yield _server
    assert _server.bugs == []


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    """A folder with a saved pico adapter."""
    folder = tmp_path / "adapter"
    pico_adapter().save(folder)
    return folder


@pytest.fixture(params=["hub", "folder"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A repository that does not exist yet, on the loopback Hub or in a folder."""
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "alice/sst2"
    return f"file://{tmp_path}/registry/alice/sst2"
