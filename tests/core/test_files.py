"""Files and folders are whole or absent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from speft_core.files import atomic_folder, atomic_write


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    atomic_write(path, lambda p: p.write_text("three") and None)
    assert path.read_text() == "three"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def full(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic_write(path, full)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as beside:
        (beside / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target) as beside:
        (beside / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as beside:
        (beside / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(FileExistsError), atomic_folder(target, replace=False):
        pass
