"""The Hugging Face Hub or a compatible endpoint (`HF_ENDPOINT`). The one file that imports huggingface_hub.

Commits go through the client's own `create_commit`. Files are streamed here instead of through its cache, so that a size
is enforced while bytes arrive, an ETag never becomes a file name, and a stale copy never stands in for an answer.
The token is the one that `hf auth login` stored or `HF_TOKEN` holds; it never appears in an argument or a file of ours.
"""

from __future__ import annotations

import io
import ipaddress
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status

from speft_core import UserError

from .registry import SHA, Commit, Content, Dropped, Entry, Listed, NotFound, References, StaleParent

try:  # huggingface_hub 2.x; 1.x speaks through httpx under its own name
    import httpx2 as httpx
except ImportError:  # pragma: no cover
    import httpx  # type: ignore[no-redef,import-not-found]

FILE_LIMIT = 10_000  # files of a repository that we are ready to list
REDIRECTS = 5
LIBRARY = "speft"


def is_loopback(url: str) -> bool:
    """Whether the host of `url` is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(url: str) -> str:
    """`url` if a token may be sent there: https anywhere, plain http to this machine only; UserError otherwise."""
    scheme = urlsplit(url).scheme
    if scheme == "https" or (scheme == "http" and is_loopback(url)):
        return url
    raise UserError(f"HF_ENDPOINT must be https:// (plain http only to this machine, a token would be readable), got {url!r}")


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn the client's errors into one line for people."""
    try:
        yield
    except errors.GatedRepoError:
        raise NotFound(
            f"{what} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(f"{what} not found; if it is private, log in with `hf auth login` or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise NotFound(f"{what}: no such revision") from None
    except errors.EntryNotFoundError:
        raise NotFound(f"{what}: no such file") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        message = (error.server_message or "").strip().replace("\n", " ")[:200]
        hint = "; log in with `hf auth login` or set HF_TOKEN" if status in (401, 403) else ""
        if status == 412:
            raise StaleParent(f"{what}: someone pushed since; pull and push again") from None
        raise UserError(f"{what}: {constants.ENDPOINT} answered {status} {message}".rstrip() + hint) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set, nothing can be asked; unset it or use a file:// registry") from None
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from None
    except httpx.HTTPError as error:
        raise UserError(
            f"{what}: no answer from {constants.ENDPOINT} ({type(error).__name__}: {error})".replace("\n", " ")
        ) from None


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


class HubRegistry:
    """Model repositories of the endpoint that huggingface_hub is set to."""

    def __init__(self) -> None:
        self.endpoint = check_endpoint(constants.ENDPOINT)
        self._api = HfApi(endpoint=self.endpoint, library_name=LIBRARY)
        if not sys.stderr.isatty():
            disable_progress_bars()

    def address(self, repo: str) -> str:
        return repo

    def resolve(self, repo: str, revision: str) -> str:
        with _plainly(f"{repo}@{revision}"):
            sha = self._api.model_info(repo, revision=revision).sha or ""
        if not SHA.fullmatch(sha):
            raise UserError(f"{repo}: {self.endpoint} gave {sha!r} for {revision!r}, which is no commit")
        if SHA.fullmatch(revision) and sha != revision:
            raise UserError(f"{repo}: asked for commit {revision}, {self.endpoint} answered with {sha}")
        return sha

    def tree(self, repo: str, sha: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        with _plainly(f"{repo}@{sha[:12]}"):
            listing = self._api.list_repo_tree(repo, recursive=True, revision=sha)
            for item in itertools.islice(listing, FILE_LIMIT + 1):
                if isinstance(item, huggingface_hub.hf_api.RepoFile):
                    found[item.path] = self._entry(repo, item)
                if len(found) > FILE_LIMIT:
                    raise UserError(f"{repo}: more than {FILE_LIMIT} files; an adapter has a dozen")
        return found

    @staticmethod
    def _entry(repo: str, item: huggingface_hub.hf_api.RepoFile) -> Entry:
        """The digests as the Hub lists them: sha256 for large files, git's sha1 for the others."""
        sha256 = item.lfs.sha256 if item.lfs else None
        size = item.lfs.size if item.lfs else item.size
        digest, length = (sha256, 64) if item.lfs else (item.blob_id, 40)
        good = isinstance(digest, str) and len(digest) == length and set(digest) <= set("0123456789abcdef")
        if not good or not isinstance(size, int) or size < 0 or size != item.size:
            raise UserError(f"{repo}: {item.path!r} is listed with size {item.size!r} and digest {digest!r}, which cannot be")
        return Entry(size, sha256=sha256, git_sha1=None if item.lfs else item.blob_id)

    def read(self, repo: str, sha: str, path: str, start: int) -> Iterator[bytes]:
        url = f"{self.endpoint}/{repo}/resolve/{sha}/{quote(path)}"
        headers = build_hf_headers(library_name=LIBRARY) | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        what = f"{repo}@{sha[:12]}: {path}"
        origin = urlsplit(url)[:2]
        with _plainly(what):
            for _ in range(REDIRECTS + 1):
                with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=60) as response:
                    commit = response.headers.get("X-Repo-Commit")
                    if commit is not None and commit != sha:
                        raise UserError(f"{what}: asked at this commit, {self.endpoint} answered from {commit[:64]!r}")
                    if response.status_code not in (301, 302, 303, 307, 308):
                        yield from self._body(response, start, what)
                        return
                    url = self._redirected(url, response.headers.get("Location", ""), what)
                    if urlsplit(url)[:2] != origin:
                        headers.pop("authorization", None)
                        headers.pop("Authorization", None)
        raise UserError(f"{what}: more than {REDIRECTS} redirects")

    def _redirected(self, url: str, location: str, what: str) -> str:
        """Where a redirect leads, if we may follow it: https, or this machine when the endpoint is on this machine."""
        target = urljoin(url, location)
        if urlsplit(target).scheme == "https" and not is_loopback(target):
            return target
        if urlsplit(target).scheme in ("http", "https") and is_loopback(target) and is_loopback(self.endpoint):
            return target
        raise UserError(f"{what}: refused a redirect to {target[:100]!r}; it must be https")

    @staticmethod
    def _body(response: httpx.Response, start: int, what: str) -> Iterator[bytes]:
        if response.status_code in (408, 429, 500, 502, 503, 504):
            raise Dropped(f"{what}: status {response.status_code}")
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            raise UserError(f"{what}: the rest was asked for, the server sent it all")
        try:
            yield from response.iter_raw(1 << 16)
        except httpx.TransportError as error:
            raise Dropped(f"{what}: {type(error).__name__}") from None

    def create(self, repo: str, private: bool) -> None:
        with _plainly(repo):
            # Asked first: a repository that exists keeps its visibility, and needs no right to create.
            try:
                self._api.model_info(repo)
            except errors.RepositoryNotFoundError as error:
                if isinstance(error, errors.GatedRepoError):
                    return
                self._api.create_repo(repo, private=private, exist_ok=True)

    def commit(
        self, repo: str, branch: str, parent: str, add: Mapping[str, Content], delete: Sequence[str], message: str
    ) -> str:
        def operation(path: str, content: Content) -> CommitOperationAdd:
            # A path is opened here, so that no `~` in it is expanded by the client.
            opened = content if isinstance(content, bytes) else io.BufferedReader(io.FileIO(content, "rb", opener=_no_links))
            return CommitOperationAdd(path_in_repo=path, path_or_fileobj=opened)

        with _plainly(repo):
            operations: list[Any] = [*(operation(p, c) for p, c in add.items()), *(CommitOperationDelete(p) for p in delete)]
            try:
                made = self._api.create_commit(
                    repo, operations, commit_message=message, revision=branch, parent_commit=parent, num_threads=1
                )
            except RuntimeError as error:  # the client's word for an upload that failed
                if not isinstance(error.__cause__, (httpx.HTTPError, OSError)):
                    raise
                raise UserError(f"{repo}: {error} {type(error.__cause__).__name__}; push again".replace("\n", " ")) from None
            except ValueError as error:  # the client's word for a card that the Hub refuses
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{repo}: refused: {' '.join(str(error).split())[:300]}") from None
            finally:
                for item in operations:
                    if isinstance(item, CommitOperationAdd) and isinstance(item.path_or_fileobj, io.BufferedReader):
                        item.path_or_fileobj.close()
        return str(made.oid)

    def branch(self, repo: str, name: str, sha: str) -> None:
        with _plainly(f"{repo}: branch {name}"):
            self._api.create_branch(repo, branch=name, revision=sha)

    def tag(self, repo: str, name: str, sha: str) -> None:
        with _plainly(f"{repo}: tag {name}"):
            self._api.create_tag(repo, tag=name, revision=sha)

    def references(self, repo: str) -> References:
        with _plainly(repo):
            refs = self._api.list_repo_refs(repo)
        return References({b.name: b.target_commit for b in refs.branches}, {t.name: t.target_commit for t in refs.tags})

    def history(self, repo: str, sha: str) -> list[Commit]:
        with _plainly(f"{repo}@{sha[:12]}"):
            commits = self._api.list_repo_commits(repo, revision=sha)
        return [Commit(c.commit_id, c.title, c.created_at.isoformat(), ", ".join(c.authors)) for c in commits]

    def search(self, owner: str | None) -> list[Listed]:
        with _plainly(owner or self.endpoint):
            found = list(self._api.list_models(author=owner, filter="speft", limit=200, full=True, cardData=True))
        listed = []
        for model in found:
            base = model.card_data.get("base_model") if model.card_data else None
            date = model.last_modified.isoformat() if model.last_modified else ""
            listed.append(Listed(model.id, model.sha or "", bool(model.private), str(base) if base else None, date))
        return listed
