"""Building the compiled plan: optional, once, where it was asked for, and whole or not at all."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from speft_core.ops import native

needs_compiler = pytest.mark.skipif(bool(native.reason()), reason=f"the compiled plan is not there: {native.reason()}")


def load() -> tuple[ctypes.CDLL | None, str]:
    """What a process finds that has not asked before."""
    return native._load.__wrapped__()


def compiler(folder: Path, script: str) -> str:
    """A program that stands for a C compiler."""
    made = folder / "cc"
    made.write_text(f"#!/bin/sh\n{script}\n")
    made.chmod(0o755)
    return str(made)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Builds are not optimised, and go to a folder of this test."""
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SPEFT_NATIVE", "1")
    monkeypatch.setenv("SPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_can_be_turned_off_and_does_without_a_compiler(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = compiler(quick.parent, "exit 1")
    monkeypatch.setenv("CC", broken)
    assert load() == (None, f"{broken} cannot build it (CalledProcessError)")
    said = 'echo "native.h:1: note: here" >&2; echo "native.c:7: error: no such word" >&2'
    broken = compiler(quick.parent, f'[ "$1" = --version ] && exit 0; {said}; exit 1')
    assert load() == (None, f"{broken} cannot build it (native.c:7: error: no such word)")
    monkeypatch.setenv("CC", str(quick / "nowhere"))
    assert load() == (None, f"{quick}/nowhere cannot build it (FileNotFoundError)")
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert load() == (None, "no C compiler")
    monkeypatch.setenv("SPEFT_NATIVE", "0")
    assert load() == (None, "SPEFT_NATIVE=0")


@needs_compiler
def test_it_is_built_once_and_without_a_writable_cache(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda compiler, target: (built.append(target), build(compiler, target)))
    for _ in range(2):
        library, reason = load()
        assert library is not None and reason == "" and library.speft_abi() == native.ABI
    assert built == list(quick.iterdir())  # one, and not again
    with monkeypatch.context() as changed:
        changed.setattr(native, "ABI", native.ABI + 1)
        assert load() == (None, "native.c is of another version than native.py")
    (quick.parent / "file").write_text("")
    monkeypatch.setenv("SPEFT_CACHE", str(quick.parent / "file" / "below"))
    library, reason = load()
    assert library is not None and reason == ""


@needs_compiler
def test_another_processor_compiler_or_flag_means_another_build(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Path] = []

    def build(_: str, target: Path) -> None:
        targets.append(target)
        raise OSError

    monkeypatch.setattr(native, "_build", build)
    changes: list[tuple[str, Any]] = [
        ("_processor", lambda: "flags: abacus"),
        ("FLAGS", (*native.FLAGS, "-DOTHER")),
        ("_openmp", lambda: ["libgomp.so"]),
    ]
    assert load()[0] is None
    for name, value in changes:
        monkeypatch.setattr(native, name, value)
        assert load()[0] is None
    monkeypatch.setenv("CC", compiler(quick.parent, "echo other"))
    assert load()[0] is None
    names = [t.name for t in targets]
    assert names[::2] == names[1::2]  # first in the cache, then, as that failed, in a folder of its own
    assert len(set(names[::2])) == 5
    assert {t.parent for t in targets[::2]} == {quick} and quick not in {t.parent for t in targets[1::2]}


@needs_compiler
@pytest.mark.parametrize("openmp", [True, False])
def test_a_build_appears_whole_where_it_was_asked_for(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], openmp: bool
) -> None:
    if not openmp:  # as where PyTorch brings no OpenMP
        monkeypatch.setattr(native, "_openmp", list)
    target = quick / "a" / "b" / "native.so"
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "clang"
    commands, run = [], subprocess.run
    with monkeypatch.context() as building:
        building.setattr(tempfile, "tempdir", str(quick / "elsewhere"))  # it may lie on another disk, from which nothing can be renamed
        building.setattr(subprocess, "run", lambda command, **options: (commands.append(command), run(command, **options))[1])
        native._build(found, target)
    assert list(target.parent.iterdir()) == [target]
    assert ["-fopenmp" in command for command in commands] == [openmp, False]
    assert ctypes.CDLL(str(target)).speft_abi() == native.ABI
    needs = subprocess.run(["ldd", str(target)], capture_output=True, text=True, check=True).stdout
    assert ("libgomp" in needs or "libiomp" in needs) == openmp
    assert capfd.readouterr() == ("", "")


def test_without_openmp_there_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(native, "_openmp", lambda: ["libgomp.so"])
    assert native._threads() == 3
    monkeypatch.setattr(native, "_openmp", list)
    assert native._threads() == 1


SCRIPTS = {
    "compiling fails": "echo no >&2; exit 1",
    "linking fails": 'case "$*" in *-shared*) exit 1;; esac',
    "hangs": "exec sleep 60",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_build_that_fails_leaves_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str
) -> None:
    if script == "hangs":
        monkeypatch.setattr(native, "BUILD_SECONDS", 0.2)
    error = subprocess.TimeoutExpired if script == "hangs" else subprocess.CalledProcessError
    with pytest.raises(error):
        native._build(compiler(quick.parent, SCRIPTS[script]), quick / "native.so")
    assert list(quick.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_the_cache_lies_where_it_was_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    monkeypatch.setenv("SPEFT_CACHE", "~/mine")
    assert native._cache_folder() == Path("/home/ada/mine")
    monkeypatch.setenv("SPEFT_CACHE", "")
    assert native._cache_folder() == Path("/home/ada/caches/speft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native._cache_folder() == Path("/home/ada/.cache/speft")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vendor\t: x\nflags\t: fpu \xff\nflags\t: again\n", "flags\t: fpu \ufffd"),
        ("Processor: y\nFeatures\t: asimd\n", "Features\t: asimd"),
        ("Flags: no\nthe flags\n", "its name"),
        (None, "its name"),
    ],
)
def test_a_processor_is_told_by_its_flags_else_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, found: str
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(platform, "processor", lambda: "its name")
    monkeypatch.setattr(native, "Path", lambda name: tmp_path / name.removeprefix("/proc/"))
    assert native._processor() == found
