"""What the tests of a hostile Hub share: an honest adapter to attack, and how a refusal is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hub.loopback import LoopbackHub
from hub.loopback.store import Blob, large_blob
from speft_core import UserError
from speft_hub import pull, push

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def published(hub: LoopbackHub, adapter_dir: Path) -> LoopbackHub:
    """The loopback Hub with an honest adapter in alice/sst2."""
    push(adapter_dir, "alice/sst2")
    hub.requests.clear()
    return hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a pull writes: a folder of its own, so that anything beside it is seen."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room" / "sst2"


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} - {"room/.sst2.lock"}


def refuse(target: Path, match: str, address: str = "alice/sst2", **options: Any) -> None:
    """The pull fails with one line, and what the disk holds is what it held before."""
    root = target.parent.parent
    before = files_below(root)
    with pytest.raises(UserError, match=match) as caught:
        pull(address, target, **options)
    assert "\n" not in str(caught.value)
    assert files_below(root) == before
    assert not target.exists()


def replace(hub: LoopbackHub, files: dict[str, bytes | None], repo: str = "alice/sst2") -> None:
    """Put a commit on main as an attacker with write access would."""
    import hashlib

    tree = dict(hub.repos[repo].commits[hub.repos[repo].branches["main"]].tree)
    for name, data in files.items():
        if data is None:
            tree.pop(name)
        elif name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            hub.large[sha256] = data
            tree[name] = large_blob(sha256, len(data))
        else:
            tree[name] = Blob(data)
    hub.repos[repo].add_commit("main", tree, "attack", "", "mallory")
