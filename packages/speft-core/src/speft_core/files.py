"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def check_readable(path: str | Path) -> None:
    """Raise the OSError of a file that cannot be opened, where safetensors says "No such file" whatever the reason."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # before it is opened: a pipe would wait for a writer
        number, why = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "Not a regular file")
        raise OSError(number, why, str(path))
    Path(path).open("rb").close()


def reason(error: OSError) -> str:
    """What went wrong with which file, for a message: "adapter_config.json: Permission denied"."""
    name = f"{Path(os.fsdecode(error.filename)).name}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{name}{error.strerror or error}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Content = bytes | str | Callable[[Path], None]


def atomic_write(path: str | Path, content: Content) -> None:
    """Write `content` (bytes, text, or a function that writes the file it is given) to `path` or leave `path` as it was.

    Raises OSError when the disk is full or the folder cannot be written; the half-written neighbour is removed.
    """
    atomic_files({Path(path): content})


def atomic_files(contents: Mapping[Path, Content]) -> None:
    """As atomic_write, for files that belong together: all are written and flushed before the first is renamed."""
    beside: dict[Path, Path] = {}
    mask = os.umask(0)
    os.umask(mask)
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            os.close(descriptor)
            beside[path] = Path(name)
            if callable(content):
                content(beside[path])
            else:
                beside[path].write_bytes(content.encode() if isinstance(content, str) else content)
            beside[path].chmod(0o666 & ~mask)  # mkstemp makes private files; the result has the permissions of any new file
            _flush(beside[path])
        for path, written in beside.items():
            os.replace(written, path)
    finally:
        for written in beside.values():
            written.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on a clean exit it takes the place of `path`, otherwise it is removed.

    With `replace=False` an existing `path` raises FileExistsError. An existing folder is renamed away before the new one
    takes its name and is deleted last, so that a kill leaves one of the two whole.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o777 & ~mask)
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        old = None
        if path.exists():
            old = beside.with_name(beside.name + ".old")
            os.replace(path, old)
        os.replace(beside, path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def leftovers(path: str | Path) -> tuple[list[Path], list[Path]]:
    """What a killed `atomic_folder(path)` may have left beside `path`: half-made folders, and whole ones that were renamed away.

    Those of this very name alone: beside `llama-3`, what belongs to `llama-3.1` is another's, who may be at work on it.
    """
    path = Path(path)
    made = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]+\.partial(\.old)?")  # tempfile draws from these characters
    found = [(p, made.fullmatch(p.name)) for p in sorted(path.parent.iterdir())]
    return [p for p, m in found if m and not m[1]], [p for p, m in found if m and m[1]]
