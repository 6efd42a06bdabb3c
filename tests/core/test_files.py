"""Files and folders are whole or absent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from speft_core import files
from speft_core.files import GIVEN_UP, atomic_folder, atomic_write, sweep


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


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_of_two_writers_the_second_finds_what_the_first_made(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with pytest.raises(FileExistsError), atomic_folder(target, replace=False) as late:
        (late / "late").write_text("1")
        with atomic_folder(target, replace=False) as early:  # sweeps nothing of the other, who is at work
            (early / "early").write_text("1")
        assert (late / "late").is_file()
    assert names(tmp_path) == ["adapter"] and names(target) == ["early"]
    with atomic_folder(target) as late:
        with atomic_folder(target) as early:
            (early / "again").write_text("1")
        (late / "late").write_text("1")
    assert names(tmp_path) == ["adapter"] and names(target) == ["late"]


def test_the_place_is_checked_at_the_start_and_before_it_is_taken(tmp_path: Path) -> None:
    target, asked = tmp_path / "adapter", []

    def check() -> None:
        asked.append(target.exists())
        if target.exists():
            raise PermissionError("taken")

    with pytest.raises(PermissionError, match="taken"), atomic_folder(target, check=check):
        target.mkdir()
        (target / "theirs").write_text("1")
    assert asked == [False, True] and names(target) == ["theirs"] and names(tmp_path) == ["adapter"]
    with pytest.raises(PermissionError, match="taken"), atomic_folder(target, check=check):
        raise AssertionError("not reached")


KILLED = """
import os, runpy, signal, sys
atomic_folder = runpy.run_path(sys.argv[1])["atomic_folder"]  # the file alone: PyTorch takes seconds
with atomic_folder(sys.argv[2]) as beside:
    (beside / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, files.__file__, str(target)]).returncode == -signal.SIGKILL
        assert len(names(tmp_path)) == 1  # of the second one: it swept the first's
    (tmp_path / ".other.abc12_yz.partial").mkdir()
    with atomic_folder(target) as beside:
        (beside / "a").write_text("1")
    assert names(tmp_path) == [".other.abc12_yz.partial", "adapter"]


def test_a_folder_that_was_renamed_away_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    old = tmp_path / ".adapter.abc12_yz.partial.old"
    old.mkdir()
    (old / "a").write_text("1")
    with pytest.raises(FileExistsError), atomic_folder(target, replace=False):
        raise AssertionError("not reached")
    assert names(tmp_path) == ["adapter"] and names(target) == ["a"]
    old.mkdir()
    sweep(target)
    assert names(tmp_path) == ["adapter"] and names(target) == ["a"]


def test_without_locks_age_tells_who_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    target = tmp_path / "adapter"
    half, old = tmp_path / ".adapter.abc12_yz.partial", tmp_path / ".adapter.abc12_yz.partial.old"
    half.mkdir()
    old.mkdir()
    sweep(target)
    assert half.is_dir() and old.is_dir()  # its writer may be between two renames
    os.utime(half, (time.time() - GIVEN_UP - 60,) * 2)
    sweep(target)
    assert names(tmp_path) == ["adapter"]
    with atomic_folder(target) as beside:
        (beside / "a").write_text("1")
    assert names(target) == ["a"]


def test_an_interrupt_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as beside:
        (beside / "a").write_text("1")
    replace = os.replace

    def interrupted(source: Path, to: Path) -> None:
        if to == target and not str(source).endswith(".old"):
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as beside:
        (beside / "b").write_text("1")
    assert names(tmp_path) == ["adapter"] and names(target) == ["a"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a full one"])
def test_a_folder_that_comes_in_the_last_moment_is_asked_about(tmp_path: Path, before: str, force: bool) -> None:
    """Another writer may be at the same point: its folder comes to be after the check."""
    target, asked = tmp_path / "adapter", []
    if before != "nothing":
        target.mkdir()
    if before == "a full one":
        (target / "old").write_text("1")

    def check() -> None:
        asked.append(names(target) if target.exists() else None)
        if asked[-1] and not force and before != "a full one":
            raise PermissionError("taken")
        if len(asked) == 2:
            if before == "a full one":
                target.rename(tmp_path / "away")  # as a writer with --force does first
            target.mkdir(exist_ok=True)
            (target / "theirs").write_text("1")

    if force or before == "a full one":
        with atomic_folder(target, check=check) as beside:
            (beside / "mine").write_text("1")
        assert names(target) == ["mine"]
    else:
        with pytest.raises(PermissionError, match="taken"), atomic_folder(target, check=check) as beside:
            (beside / "mine").write_text("1")
        assert names(target) == ["theirs"] and asked[-1] == ["theirs"] and len(asked) == 3
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_lock_of_the_folder_around_is_nobodys_business(tmp_path: Path) -> None:
    """A run holds one of its own folder, into which it writes its adapter."""
    with files._locked(tmp_path) as held, atomic_folder(tmp_path / "adapter") as beside:
        assert held
        (beside / "a").write_text("1")
    assert names(tmp_path) == ["adapter"]


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = tempfile.mkdtemp, []

    def swept(**where: Any) -> str:
        made.append(make(**where))
        if len(made) == 1:
            sweep(tmp_path / "adapter")
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    with atomic_folder(tmp_path / "adapter") as beside:
        (beside / "a").write_text("1")
    assert len(made) == 2 and names(tmp_path) == ["adapter"]


def test_many_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    target, done, told = tmp_path / "adapter", [], []

    def write(number: int) -> None:
        try:
            with atomic_folder(target, replace=number < 4) as beside:
                for name in "abc":
                    (beside / name).write_text(str(number))
            done.append(number)
        except FileExistsError:
            told.append(number)

    threads = [threading.Thread(target=write, args=(number % 8,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(told) == 64 and len(done) >= 32
    assert names(tmp_path) == ["adapter"] and len({(target / name).read_text() for name in "abc"}) == 1


def test_a_folder_within_a_half_made_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "outer") as beside:
        with atomic_folder(beside / "inner") as inner:
            (inner / "a").write_text("1")
        sweep(tmp_path / "outer")  # as another writer would
        assert names(beside) == ["inner"]
    assert names(tmp_path / "outer" / "inner") == ["a"] and names(tmp_path) == ["outer"]


def test_a_link_in_the_place_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    for name, inside in (("full", True), ("empty", False)):
        (tmp_path / name).mkdir()
        if inside:
            (tmp_path / name / "mine").write_text("kept")
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        with atomic_folder(tmp_path / f"link-{name}") as beside:
            (beside / "new").write_text("new")
        assert not (tmp_path / f"link-{name}").is_symlink() and (tmp_path / f"link-{name}/new").read_text() == "new"
    assert (tmp_path / "full/mine").read_text() == "kept" and (tmp_path / "empty").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "link-empty", "link-full"]
