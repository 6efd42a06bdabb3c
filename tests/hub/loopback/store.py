"""Repositories of the loopback Hub: blobs, commits, branches and tags, all in memory."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from dataclasses import dataclass, field
from typing import Any

import yaml


class HubError(Exception):
    """An answer other than 200: the status, a message, and the code the client looks at (`X-Error-Code`)."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def git_oid(kind: str, data: bytes) -> str:
    """The object id git gives to `data`."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def front_matter(text: str) -> Any:
    """The YAML block at the top of a card, or None."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.S)
    return yaml.safe_load(found[1]) if found else None


@dataclass(frozen=True)
class Blob:
    """A file of one commit: its bytes for a regular file, its sha256 and size for a large one."""

    data: bytes
    sha256: str | None = None
    lfs_size: int = 0

    @property
    def size(self) -> int:
        return self.lfs_size if self.sha256 else len(self.data)

    @property
    def oid(self) -> str:
        return git_oid("blob", self.data)

    def entry(self, path: str) -> dict[str, Any]:
        """The file as `/tree` lists it."""
        listed: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            listed["lfs"] = {"oid": self.sha256, "size": self.lfs_size, "pointerSize": len(self.data)}
        return listed


def large_blob(sha256: str, size: int) -> Blob:
    """The pointer file that stands for a large file in git."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Blob(pointer, sha256, size)


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    tree: dict[str, Blob]
    title: str
    message: str
    author: str
    date: str

    def listed(self) -> dict[str, Any]:
        """The commit as `/commits` lists it."""
        return {
            "id": self.id,
            "title": self.title,
            "message": self.message,
            "date": self.date,
            "authors": [{"user": self.author}],
        }


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    _serial = itertools.count()

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def add_commit(self, branch: str, tree: dict[str, Blob], title: str, message: str, author: str) -> str:
        """Put a commit with `tree` on top of `branch` and return its sha."""
        parent = self.branches.get(branch)
        what = repr((sorted((p, b.oid) for p, b in tree.items()), parent, title, next(self._serial)))
        sha = git_oid("commit", what.encode())
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[sha] = Commit(sha, parent, tree, title, message, author, date)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The sha of a branch, a tag, or a commit given by at least 7 digits."""
        sha = self.branches.get(revision) or self.tags.get(revision)
        if not sha and re.fullmatch("[0-9a-f]{7,40}", revision):
            sha = next((s for s in self.commits if s.startswith(revision)), None)
        if not sha:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def history(self, sha: str) -> list[Commit]:
        """The commits from `sha` back to the first."""
        found: list[Commit] = []
        at: str | None = sha
        while at:
            found.append(self.commits[at])
            at = found[-1].parent
        return found

    def info(self, sha: str, sizes: bool) -> dict[str, Any]:
        """The repository at `sha` as `/api/models/{id}` describes it; tags are derived from the card, as on the Hub."""
        tree = self.commits[sha].tree
        card = (front_matter(tree["README.md"].data.decode()) if "README.md" in tree else None) or {}

        def many(key: str) -> list[Any]:
            value = card.get(key)
            return value if isinstance(value, list) else [value] if value else []

        relation = card.get("base_model_relation", "finetune")
        tags = [*many("library_name"), *many("tags"), *(f"license:{x}" for x in many("license"))]
        tags += [f"base_model:{relation}:{x}" for x in many("base_model")]
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(tree.items()):
            siblings.append({"rfilename": path} | ({"size": blob.size, "blobId": blob.oid} if sizes else {}))
        return {
            "id": self.id, "modelId": self.id, "author": self.owner, "sha": sha, "private": self.private, "gated": self.gated,
            "lastModified": self.commits[sha].date, "downloads": 0, "likes": 0, "tags": list(dict.fromkeys(tags)),
            "cardData": card or None, "siblings": siblings, "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"), "model-index": card.get("model-index"),
        }  # fmt: skip
