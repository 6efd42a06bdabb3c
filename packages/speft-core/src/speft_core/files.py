"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # ends the name of what is not yet whole
GIVEN_UP = 86_400.0  # seconds after which a half-made folder has no writer any more, where there are no locks to ask


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
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
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
def atomic_folder(path: str | Path, replace: bool = True, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on a clean exit it takes the place of `path`, otherwise it is removed.

    With `replace=False` an existing `path` raises FileExistsError. `check` raises where `path` must not be written. Both are
    asked twice, at the start and just before the new folder takes its name: of two writers at once, who is second finds what
    the first one made. An existing folder is renamed away before the new one takes its name and is deleted last, so that a
    kill leaves one of the two whole; what killed writers of `path` left is swept at the start.
    """
    path = Path(path)

    def allowed() -> None:
        check()
        if path.exists() and not replace:
            raise FileExistsError(f"{path} exists already")

    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    allowed()
    with _half_made(path) as beside:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o777 & ~mask)
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        _swap(beside, path, allowed)


@contextmanager
def _half_made(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked as long as its writer lives, and removed where it has not got another name."""
    while True:
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        try:
            with _locked(beside):
                if beside.exists():  # else it was swept before it was locked
                    yield beside
                    return
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of a folder, which ends with its process. Yields whether it is held; None where there is no such lock to have."""
    try:
        descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError:  # it is gone, or another user's
        descriptor = None
    if descriptor is None:
        yield None
        return
    held: bool | None = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # NFS locks files alone
            held = None
        yield held
    finally:
        os.close(descriptor)


def _swap(beside: Path, path: Path, allowed: Callable[[], None]) -> None:
    """Give the folder `beside` the name `path`; what had it is deleted. `allowed` raises where it must not.

    Another writer may be at the same point: a folder that comes to be after `allowed` was asked is not overwritten, since only
    an empty one gives way to a rename. Then it is asked again.
    """
    old = beside.with_name(beside.name + ".old")
    try:
        for tries_left in reversed(range(10)):
            try:
                full = path.is_symlink() or (path.is_dir() and any(path.iterdir()))
                allowed()
                if full:
                    os.replace(path, old)
                elif path.exists():
                    path.rmdir()
                os.replace(beside, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not (beside.exists() and tries_left):
                    raise
                shutil.rmtree(old, ignore_errors=True)  # what we were to replace is replaced
    except BaseException:  # Ctrl-C between the two
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    if old.is_symlink():  # the link is replaced, not what it leads to
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


def sweep(path: str | Path) -> None:
    """Clean up after writers of the folder `path` that were killed; one that was renamed away, and is whole, comes back."""
    path = Path(path)
    halves, olds = _leftovers(path)
    for half in halves:
        with suppress(FileNotFoundError), _locked(half, wait=False) as held:
            if held or (held is None and time.time() - half.stat().st_mtime > GIVEN_UP):
                shutil.rmtree(half, ignore_errors=True)
    for old in olds:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif not old.with_suffix("").exists():  # else its writer is about to give that one the name
            with suppress(OSError):  # somebody else was faster, or it is another user's
                os.replace(old, path)


def _leftovers(path: Path) -> tuple[list[Path], list[Path]]:
    """What writers may have left beside `path`: half-made folders, and whole ones that were renamed away.

    Those of this very name alone: beside `llama-3`, what belongs to `llama-3.1` is another's, who may be at work on it.
    """
    made = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]+{re.escape(PARTIAL)}(\.old)?")  # tempfile draws from these characters
    found = [(p, made.fullmatch(p.name)) for p in sorted(path.parent.iterdir()) if p.is_dir() and not p.is_symlink()]
    return [p for p, m in found if m and not m[1]], [p for p, m in found if m and m[1]]
