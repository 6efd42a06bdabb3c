"""What a place that keeps adapters must be able to do; how its addresses are written is in addresses.py.

Two implementations: `hub.HubRegistry` (the Hugging Face Hub or a compatible endpoint) and `folder.FolderRegistry`
(`file:///srv/adapters/alice/sst2`). Everything else in this package speaks to either through `Registry`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from speft_core import UserError

CHUNK = 1 << 20
SHA = re.compile(r"[0-9a-f]{40}")


class StaleParent(UserError):
    """A push came second: the branch has moved past the commit that the push was made for."""


class NotFound(UserError):
    """No such repository, revision or file, or no right to see it."""


class Dropped(OSError):
    """A connection ended in the middle of a file; the rest can be asked for."""


@dataclass(frozen=True)
class Entry:
    """A file at a commit: its size in bytes and at least one digest."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Commit:
    """One step of a repository's history."""

    sha: str
    title: str
    date: str
    author: str = ""


@dataclass(frozen=True)
class References:
    """Branches and tags with the commits they point at."""

    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listed:
    """A repository as a search shows it."""

    repo: str
    sha: str
    private: bool
    base_model: str | None
    date: str


Content = Path | bytes


class Registry(Protocol):
    """A place with repositories, each with commits, branches and tags."""

    def address(self, repo: str) -> str:
        """How a person writes this repository, without a revision."""

    def resolve(self, repo: str, revision: str) -> str:
        """The full sha of a branch, a tag or a commit; NotFound otherwise. Always asks; never answers from a cache."""

    def tree(self, repo: str, sha: str) -> dict[str, Entry]:
        """All files at a commit."""

    def read(self, repo: str, sha: str, path: str, start: int) -> Iterator[bytes]:
        """The bytes of a file from `start` on; raises Dropped when they end early for a reason that may pass."""

    def create(self, repo: str, private: bool) -> None:
        """Make the repository with an empty first commit on `main`, or do nothing when it exists."""

    def commit(
        self, repo: str, branch: str, parent: str, add: Mapping[str, Content], delete: Sequence[str], message: str
    ) -> str:
        """Add and delete files on top of `parent` and return the new sha; StaleParent when the branch is elsewhere."""

    def branch(self, repo: str, name: str, sha: str) -> None:
        """Start a branch at a commit; UserError when it exists."""

    def tag(self, repo: str, name: str, sha: str) -> None:
        """Name a commit for good; UserError when the tag exists."""

    def references(self, repo: str) -> References:
        """Branches and tags."""

    def history(self, repo: str, sha: str) -> list[Commit]:
        """The commits from `sha` back to the first."""

    def search(self, owner: str | None) -> list[Listed]:
        """The adapters that the caller may see, of one owner or of all."""


class Digests:
    """Both digests of a stream of known length, computed as it passes."""

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._git_sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        self._git_sha1.update(data)

    def match(self, entry: Entry) -> bool:
        """Whether the stream is the file that `entry` promises: every digest it gives must agree."""
        found = {"sha256": self._sha256.hexdigest(), "git_sha1": self._git_sha1.hexdigest()}
        promised = {"sha256": entry.sha256, "git_sha1": entry.git_sha1}
        given = {kind: value for kind, value in promised.items() if value}
        return bool(given) and all(found[kind] == value for kind, value in given.items())


def digest(content: Content) -> Entry:
    """Size and both digests of a file or of bytes."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digests = Digests(size)
    for chunk in chunks(content):
        digests.update(chunk)
    return Entry(size, digests._sha256.hexdigest(), digests._git_sha1.hexdigest())


def chunks(content: Content, start: int = 0) -> Iterator[bytes]:
    """The bytes of a file or of bytes from `start` on, a megabyte at a time."""
    if isinstance(content, bytes):
        yield content[start:]
        return
    with content.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            yield chunk


def same(a: Entry, b: Entry) -> bool:
    """Whether two entries are the same content, by whichever digest both have."""
    if a.size != b.size:
        return False
    if a.sha256 and b.sha256:
        return a.sha256 == b.sha256
    return bool(a.git_sha1) and a.git_sha1 == b.git_sha1
