"""A registry in a plain folder: `file:///srv/adapters/alice/sst2`. No server, no account, the semantics of the Hub.

Layout of a repository:

    speft-registry.json     {"format": 1, "private": false}: what makes a folder a repository
    objects/ab/abcdef…      contents of files, named by their sha256, never changed
    commits/<sha>.json      parent, tree (path -> sha256, size), title, date, author; <sha> is the sha1 of this file
    refs/heads/<branch>     the sha a branch points at; refs/tags/<tag> likewise ("/" in a name is written "%2F")

A push writes the objects, then the commit, then moves the branch by one rename, all under a lock. Whatever moment it is
killed at, the branch points at a whole commit; what was written for nothing is swept by the next push.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from speft_core import UserError
from speft_core.files import atomic_write

from .registry import CHUNK, SHA, Commit, Content, Entry, Listed, NotFound, References, StaleParent, chunks, digest

MARK = "speft-registry.json"
LOCK_SECONDS = 600.0  # how long to wait for another push
JSON_LIMIT = 4 << 20  # bytes of a commit; a tree of an adapter has a dozen files


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _read_small(path: Path, what: str) -> str:
    """The text of a small file of the registry, links refused."""
    try:
        if path.is_symlink() or path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{what} is damaged: {path} is a link or too large")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"{what} not found") from None


class FolderRegistry:
    """All repositories of this machine's file system; a repository's name is its absolute path."""

    def address(self, repo: str) -> str:
        return "file://" + quote(repo)

    def _root(self, repo: str) -> Path:
        root = Path(repo)
        if not (root / MARK).is_file():
            hint = (
                "; this folder is an adapter itself, give its path without file://"
                if (root / "adapter_config.json").exists()
                else ""
            )
            raise NotFound(f"repository {self.address(repo)} not found{hint}")
        try:
            mark = json.loads(_read_small(root / MARK, self.address(repo)))
            version = mark["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.address(repo)}: {MARK} is damaged") from None
        if version != 1:
            raise UserError(f"{self.address(repo)} has format {version!r}, this version of speft-hub reads format 1")
        return root

    def _commit(self, repo: str, sha: str) -> dict:
        what = f"commit {sha} of {self.address(repo)}"
        text = _read_small(self._root(repo) / "commits" / f"{sha}.json", what)
        if hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() != sha:
            raise UserError(f"{what} is damaged: its content has another sha")
        return json.loads(text)

    def resolve(self, repo: str, revision: str) -> str:
        root = self._root(repo)
        for kind in ("heads", "tags"):
            ref = root / "refs" / kind / _quoted(revision)
            if ref.is_file():
                sha = _read_small(ref, str(ref)).strip()
                if not SHA.fullmatch(sha):
                    raise UserError(f"{self.address(repo)}: {ref.name} is damaged: it holds no sha")
                return sha
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = sorted(p.stem for p in (root / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(f"{revision} is short for {len(found)} commits of {self.address(repo)}; give more digits")
        raise NotFound(f"revision {revision!r} of {self.address(repo)} not found")

    def tree(self, repo: str, sha: str) -> dict[str, Entry]:
        return {path: Entry(int(size), sha256) for path, (sha256, size) in self._commit(repo, sha)["tree"].items()}

    def _object(self, root: Path, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"{root}: damaged tree: {sha256!r} is no sha256")
        return root / "objects" / sha256[:2] / sha256

    def read(self, repo: str, sha: str, path: str, start: int) -> Iterator[bytes]:
        entry = self.tree(repo, sha).get(path)
        if entry is None or entry.sha256 is None:
            raise NotFound(f"{path} not found in {self.address(repo)} at {sha}")
        source = self._object(self._root(repo), entry.sha256)
        try:
            descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise UserError(f"{self.address(repo)}: the content of {path} cannot be read ({error.strerror})") from None
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size < entry.size:
                raise UserError(f"{self.address(repo)}: the content of {path} is damaged, it is cut short")
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def create(self, repo: str, private: bool) -> None:
        root = Path(repo)
        if (root / MARK).is_file():
            return
        if root.exists() and any(p for p in root.iterdir() if p.name not in ("objects", "commits", "refs", ".lock")):
            raise UserError(f"{root} exists and is no registry; choose an empty or new folder")
        outer = next((parent for parent in root.parents if (parent / MARK).is_file()), None)
        if outer is not None:
            raise UserError(f"{root} lies within the repository {self.address(str(outer))}; choose a folder beside it")
        root.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
        with self._locked(root):
            if (root / MARK).is_file():  # another push made it while this one waited, and may have pushed since
                return
            if private:
                root.chmod(0o700)
            self._write_commit(root, "main", None, {}, "initial commit")
            atomic_write(root / MARK, json.dumps({"format": 1, "private": private}) + "\n")

    @contextmanager
    def _locked(self, root: Path) -> Iterator[None]:
        lock = FileLock(root / ".lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another push to {root} has been running for {LOCK_SECONDS / 60:g} minutes; try again later") from None
        try:
            yield
        finally:
            lock.release()

    def _write_commit(self, root: Path, branch: str, parent: str | None, tree: dict[str, tuple[str, int]], title: str) -> str:
        try:
            author = getpass.getuser()
        except (KeyError, OSError):  # a container without a user database
            author = ""
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        body = {"parent": parent, "tree": dict(sorted(tree.items())), "title": title, "date": date, "author": author}
        text = json.dumps(body | {"nonce": os.urandom(8).hex()}, indent=1)
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        atomic_write(root / "commits" / f"{sha}.json", text)
        atomic_write(root / "refs" / "heads" / _quoted(branch), sha + "\n")
        return sha

    def commit(
        self, repo: str, branch: str, parent: str, add: Mapping[str, Content], delete: Sequence[str], message: str
    ) -> str:
        root = self._root(repo)
        with self._locked(root):
            self._sweep(root)
            if not (root / "refs" / "heads" / _quoted(branch)).is_file():
                raise UserError(f"{self.address(repo)}: {branch!r} is no branch, and only branches move; push to main or --branch NAME")
            if self.resolve(repo, branch) != parent:
                raise StaleParent(f"{self.address(repo)}: someone pushed to {branch} since {parent[:12]}; pull and push again")
            tree = {p: (sha256, size) for p, (sha256, size) in self._commit(repo, parent)["tree"].items() if p not in delete}
            for path, content in add.items():
                entry = self._store(root, content)
                tree[path] = (entry.sha256 or "", entry.size)
            return self._write_commit(root, branch, parent, tree, message)

    def _store(self, root: Path, content: Content) -> Entry:
        """Put a file's content among the objects unless it is there, and return its digests as they were written."""
        entry = digest(content)
        target = self._object(root, entry.sha256 or "")
        if target.exists() and target.stat().st_size == entry.size:
            return entry

        def copy(beside: Path) -> None:
            with beside.open("wb") as file:
                for chunk in chunks(content):
                    file.write(chunk)

        atomic_write(target, copy)
        if digest(target) != entry:
            target.unlink()
            raise UserError(f"a file changed while it was pushed ({entry.size} bytes before); push again")
        return entry

    @staticmethod
    def _sweep(root: Path) -> None:
        """Remove what pushes killed half-way left behind; the caller holds the lock."""
        for leftover in root.rglob(".*.partial"):
            leftover.unlink(missing_ok=True)

    def _reference(self, repo: str, kind: str, name: str, sha: str) -> None:
        root = self._root(repo)
        self._commit(repo, sha)
        with self._locked(root):
            for other in ("heads", "tags"):  # a branch and a tag of one name: an address would mean the branch, and hide the tag
                target = root / "refs" / other / _quoted(name)
                if target.exists():
                    raise UserError(f"{self.address(repo)} has {name!r} already, at {_read_small(target, name).strip()[:12]}")
            atomic_write(root / "refs" / kind / _quoted(name), sha + "\n")

    def branch(self, repo: str, name: str, sha: str) -> None:
        self._reference(repo, "heads", name, sha)

    def tag(self, repo: str, name: str, sha: str) -> None:
        self._reference(repo, "tags", name, sha)

    def references(self, repo: str) -> References:
        root = self._root(repo)

        def under(kind: str) -> dict[str, str]:
            found = sorted((root / "refs" / kind).glob("*"))
            return {unquote(p.name): _read_small(p, p.name).strip() for p in found if not p.name.startswith(".")}

        return References(under("heads"), under("tags"))

    def history(self, repo: str, sha: str) -> list[Commit]:
        found: list[Commit] = []
        at: str | None = sha
        while at:
            commit = self._commit(repo, at)
            found.append(Commit(at, str(commit["title"]), str(commit["date"]), str(commit["author"])))
            at = commit["parent"]
        return found

    def search(self, owner: str | None) -> list[Listed]:
        """The repositories at or under the folder `owner`, two levels deep at most."""
        root = Path(owner or ".").resolve()
        if not root.is_dir():
            raise NotFound(f"there is no folder {root}")
        marks = [m for depth in ("", "*/", "*/*/") for m in root.glob(depth + MARK)]
        return [self._listed(str(mark.parent)) for mark in sorted(marks)]

    def _listed(self, repo: str) -> Listed:
        sha = self.resolve(repo, "main")
        private = bool(json.loads(_read_small(Path(repo) / MARK, repo)).get("private"))
        base = None
        if "adapter_config.json" in self._commit(repo, sha)["tree"]:
            text = b"".join(self.read(repo, sha, "adapter_config.json", 0))
            try:
                base = json.loads(text).get("base_model_name_or_path")
            except (ValueError, AttributeError, RecursionError):
                base = None
        return Listed(self.address(repo), sha, private, base, self.history(repo, sha)[0].date)
