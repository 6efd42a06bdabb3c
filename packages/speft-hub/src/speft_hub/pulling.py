"""Fetching an adapter: pinned to a commit, checked byte for byte and then as an adapter, and only then given its name."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from speft_core import SparseAdapter, UserError
from speft_core.files import atomic_folder, sweep

from . import names
from .addresses import Reference, parse
from .registry import Digests, Dropped, Entry, same
from .registry import digest as digest_of

RETRIES = 5
RETRY_SECONDS = 1.0
LOCK_SECONDS = 600.0  # how long to wait for another pull into the same folder
DEFAULT_MAX_BYTES = 16 << 30

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes so far, bytes in all)."""


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: where it lies, which commit it is, how many bytes, and whether anything was fetched."""

    path: Path
    repo: str
    sha: str
    files: dict[str, int]
    fetched: bool


def check_folder(folder: Path) -> SparseAdapter:
    """Load and check everything in an adapter's folder; UserError for what is damaged or hostile."""
    adapter = SparseAdapter.load(folder)
    for name in ("config.json", "results.json", names.HEADS):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                raise UserError(f"{folder / name} is not readable JSON") from None
            if not isinstance(content, dict):
                raise UserError(f"{folder / name} must hold a JSON object, got {type(content).__name__}")
    if (folder / names.HEADS).is_file():
        from speft_core.multihead import load_heads

        load_heads(folder)
    return adapter


def pull(
    reference: str | Reference,
    target: str | Path | None = None,
    *,
    force: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch `owner/name[@revision]` or `file:///…[@revision]` into the folder `target` (by default the repository's name).

    The revision is resolved to a commit first and everything is asked at that commit. Only names of an adapter's files are
    fetched, no byte more than their listed sizes, and each must have its listed digest. The adapter is loaded and checked in
    a new folder beside `target`, which is then renamed. An existing `target` is left alone when it is that very adapter,
    replaced with `force`, and refused otherwise. Concurrent pulls into one `target` wait for each other.
    """
    reference = parse(reference) if isinstance(reference, str) else reference
    registry, repo = reference.registry, reference.repo
    sha = registry.resolve(repo, reference.revision or "main")
    wanted = _wanted(registry.tree(repo, sha), registry.address(repo), max_bytes)
    target = Path(target) if target is not None else Path(repo.rsplit("/", 1)[-1])
    target = target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()
    sizes = {name: entry.size for name, entry in wanted.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        sweep(target)
        if _is_there(target, wanted):
            check_folder(target)
            return Pulled(target, registry.address(repo), sha, sizes, fetched=False)
        check_place = partial(names.check_place, target, force)
        check_place()
        free = shutil.disk_usage(target.parent).free
        if sum(sizes.values()) > free:
            raise UserError(f"{target}: {sum(sizes.values()):,} bytes are needed, {free:,} are free")
        with atomic_folder(target, check=check_place) as beside:
            for name, entry in wanted.items():
                _fetch(Reference(registry, repo, sha), name, entry, beside / name, progress)
            check_folder(beside)
    return Pulled(target, registry.address(repo), sha, sizes, fetched=True)


def _wanted(tree: Mapping[str, Entry], where: str, max_bytes: int) -> dict[str, Entry]:
    wanted = {name: tree[name] for name in names.choose(tree, where)}
    for name, entry in wanted.items():
        names.check_size(name, entry.size, where)
    total = sum(entry.size for entry in wanted.values())
    if total > max_bytes:
        raise UserError(
            f"{where}: at most {max_bytes:,} bytes are fetched, it has {total:,}; raise --max-bytes if you trust it"
        )
    return wanted


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another pull into {target} has been running for {LOCK_SECONDS / 60:g} minutes; try again later") from None
    try:
        yield
    finally:
        lock.release()


def _is_there(target: Path, wanted: Mapping[str, Entry]) -> bool:
    """Whether `target` holds exactly the wanted files with the wanted contents, and nothing that is a link."""
    if target.is_symlink() or not target.is_dir():
        return False
    present = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_symlink() or not p.is_dir()}
    if set(present) != set(wanted) or any(p.is_symlink() for p in target.rglob("*")):
        return False
    return all(same(digest_of(present[name]), entry) for name, entry in wanted.items())


def fetch_small(at: Reference, name: str, entry: Entry) -> bytes:
    """The checked bytes of one small file of a repository at a commit."""
    names.check_size(name, entry.size, at.registry.address(at.repo))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        _fetch(at, name, entry, file, None)
        return file.read_bytes()


def _fetch(at: Reference, name: str, entry: Entry, file: Path, progress: Progress | None) -> None:
    """Stream one file to disk; UserError when it is longer than listed or other than its digest says."""
    registry, repo, sha = at.registry, at.repo, at.revision or ""
    where = f"{registry.address(repo)}@{sha[:12]}: {name}"
    digests, done, failures = Digests(entry.size), 0, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as out:
        while done < entry.size or done == 0:
            try:
                for chunk in registry.read(repo, sha, name, done):
                    done += len(chunk)
                    if done > entry.size:
                        raise UserError(f"{where}: more bytes came than the {entry.size:,} that are listed")
                    digests.update(chunk)
                    out.write(chunk)
                    failures = 0
                    if progress:
                        progress(name, done, entry.size)
                if done < entry.size:
                    raise Dropped(f"{where}: ended after {done:,} of {entry.size:,} bytes")
                break
            except Dropped as error:
                failures += 1
                if failures > RETRIES:
                    raise UserError(f"{error}; gave up after {RETRIES} tries") from None
                time.sleep(RETRY_SECONDS * failures)
    if not digests.match(entry):
        raise UserError(f"{where}: damaged or forged, its content does not have the listed digest")
