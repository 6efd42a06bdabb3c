"""The routes of the loopback Hub: what the client of huggingface_hub asks for model repositories, and nothing more."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .store import Blob, HubError, Repo, front_matter, large_blob

if TYPE_CHECKING:
    from .server import Request

PAGE = 50  # entries of a tree per page
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".zip", ".gz")
REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"

Route = tuple[tuple[str, ...], re.Pattern[str], Callable[..., None]]
ROUTES: list[Route] = []


def route(methods: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function for some methods and a pattern of paths; its groups are the function's arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((tuple(methods.split()), re.compile(path), function))
        return function

    return register


# Who may do what


def see(request: Request, repo_id: str) -> Repo:
    """The repository, if the caller may know of it."""
    repo = request.hub.repos.get(repo_id)
    if repo is None or (repo.private and repo.owner != request.user):
        raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
    return repo


def open_files(request: Request, repo_id: str) -> Repo:
    """The repository, if the caller may read its files."""
    repo = see(request, repo_id)
    if repo.gated and repo.owner != request.user:
        raise HubError(403 if request.user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
    return repo


def own(request: Request, owner: str) -> None:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if owner != request.user:
        raise HubError(403, f"You don't have the rights to write under the namespace {owner}")


def writable(request: Request, repo_id: str) -> Repo:
    repo = see(request, repo_id)
    own(request, repo.owner)
    return repo


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> None:
    own(request, request.user or "")
    request.reply(200, {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/validate-yaml")
def validate_card(request: Request) -> None:
    good = isinstance(front_matter(request.json()["content"]), dict | None)
    request.reply(200 if good else 400, {"errors": [] if good else [{"message": "invalid YAML metadata"}], "warnings": []})


@route("POST", "/api/repos/create")
def create(request: Request) -> None:
    body = request.json()
    owner = body.get("organization") or request.user
    own(request, owner)
    repo_id = f"{owner}/{body['name']}"
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repos:
        request.reply(409, {"error": "You already created this model repo", "url": url})
        return
    repo = Repo(repo_id, body.get("visibility") == "private" or bool(body.get("private")))
    repo.add_commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit", "", "system")
    request.hub.repos[repo_id] = repo
    request.reply(200, {"url": url, "name": repo_id})


@route("GET", "/api/models")
def search(request: Request) -> None:
    wanted, author = request.query.get("filter", []), request.query.get("author", [""])[0]
    found = []
    for repo in request.hub.repos.values():
        info = repo.info(repo.branches["main"], sizes=False)
        hidden = repo.private and repo.owner != request.user
        if not hidden and author in ("", repo.owner) and set(wanted) <= set(info["tags"]):
            found.append(info)
    request.reply(200, found)


@route("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?")
def information(request: Request, repo_id: str, revision: str) -> None:
    repo = see(request, repo_id)
    info = repo.info(repo.resolve(revision or "main"), request.query.get("blobs", [""])[0].lower() == "true")
    if fault := request.fault("commit"):
        info["sha"] = fault["sha"]
    request.reply(200, info)


@route("GET", rf"/api/models/([\w.-]+)(?:/revision/{REVISION})?")
def without_owner(request: Request, name: str, revision: str) -> None:
    see(request, name)  # none is here but those that have moved


@route("GET", f"/api/models/{REPO}/tree/{REVISION}")
def tree(request: Request, repo_id: str, revision: str) -> None:
    repo = open_files(request, repo_id)
    files = repo.commits[repo.resolve(revision)].tree
    entries: list[dict[str, Any]] = [blob.entry(path) for path, blob in sorted(files.items())]
    folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
    entries += [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]
    if fault := request.fault("tree"):
        entries = fault["entries"] + ([] if fault.get("replace") else entries)
    start = int(request.query.get("cursor", ["0"])[0])
    endless = request.fault("pages") is not None
    more = endless or start + PAGE < len(entries)
    link = f'<{request.hub.url}{urlsplit(request.path).path}?recursive=true&cursor={start + PAGE}>; rel="next"'
    page = [e | {"path": f"f{start}-{i}.txt"} for i, e in enumerate(entries)] if endless else entries[start : start + PAGE]
    request.reply(200, page, {"Link": link} if more else {})


@route("GET", f"/api/models/{REPO}/commits/{REVISION}")
def commits(request: Request, repo_id: str, revision: str) -> None:
    repo = see(request, repo_id)
    request.reply(200, [c.listed() for c in repo.history(repo.resolve(revision))])


@route("GET", f"/api/models/{REPO}/refs")
def refs(request: Request, repo_id: str) -> None:
    repo = see(request, repo_id)

    def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]

    request.reply(200, {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})


@route("POST DELETE", f"/api/models/{REPO}/(branch|tag)/{REVISION}")
def reference(request: Request, repo_id: str, kind: str, name: str) -> None:
    """`POST branch/NEW {startingPoint}`, `POST tag/REVISION {tag}`, `DELETE branch|tag/NAME`."""
    repo, body = writable(request, repo_id), request.json()
    names = repo.branches if kind == "branch" else repo.tags
    new = body.get("tag", name)
    if request.method == "DELETE":
        if names.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    elif new in names:
        raise HubError(409, f"Reference already exists: {new}")
    else:
        names[new] = repo.resolve(name if kind == "tag" else body.get("startingPoint", "main"))
    request.reply(200, {})


# Pushing: ask how to send each file, send the large ones, then commit


@route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
def preupload(request: Request, repo_id: str, revision: str) -> None:
    repo = writable(request, repo_id)
    files = repo.commits[repo.resolve(revision)].tree
    answers = []
    for item in request.json()["files"]:
        old = files.get(item["path"])
        large = item["path"].endswith(LARGE_SUFFIXES) or item["size"] > 10_000_000
        oid = (old.sha256 or old.oid) if old else None
        mode = "lfs" if large else "regular"
        answers.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.reply(200, {"files": answers})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def large_batch(request: Request, repo_id: str) -> None:
    writable(request, repo_id)
    answers: list[dict[str, Any]] = []
    for item in request.json()["objects"]:
        oid, hub = item["oid"], request.hub
        upload = {"href": f"{hub.cdn}/lfs/put/{oid}"}
        verify = {"href": f"{hub.url}/lfs/verify/{oid}"}
        new = {} if oid in hub.large else {"actions": {"upload": upload, "verify": verify}}
        answers.append({"oid": oid, "size": item["size"]} | new)
    request.reply(200, {"transfer": "basic", "objects": answers})


@route("PUT", r"/lfs/put/(\w+)")
def large_put(request: Request, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "sha256 mismatch")
    request.hub.large[oid] = request.body
    request.reply(200, {})


@route("POST", r"/lfs/verify/(\w+)")
def large_verify(request: Request, oid: str) -> None:
    if len(request.hub.large.get(oid, b"")) != request.json()["size"]:
        raise HubError(404, "LFS object missing or of a wrong size")
    request.reply(200, {})


@route("POST", f"/api/models/{REPO}/commit/{REVISION}")
def commit(request: Request, repo_id: str, revision: str) -> None:
    repo = writable(request, repo_id)
    head = repo.resolve(revision)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = lines[0]["value"]
    if not head.startswith(header.get("parentCommit") or ""):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[head].tree)
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in request.hub.large:
                raise HubError(400, f"LFS object missing for {value['path']}")
            files[value["path"]] = large_blob(value["oid"], len(request.hub.large[value["oid"]]))
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"unknown operation {key}")
    sha = repo.add_commit(revision, files, header["summary"], header.get("description", ""), str(request.user))
    request.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{request.hub.url}/{repo_id}/commit/{sha}"})


# Pulling: small files come from here, large ones by a redirect to the other origin


@route("GET HEAD", f"/{REPO}/resolve/{REVISION}/(.+)")
def download(request: Request, repo_id: str, revision: str, path: str) -> None:
    repo = open_files(request, repo_id)
    sha = repo.resolve(revision)
    blob = repo.commits[sha].tree.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    fault = request.fault("commit")
    headers = {"X-Repo-Commit": fault["sha"] if fault else sha}
    if fault := request.fault("redirect"):
        request.reply(302, b"", headers | {"Location": fault["to"]})
    elif blob.sha256 is None:
        request.send_file(blob.data, headers | {"ETag": f'"{blob.oid}"'})
    else:
        fault = request.fault("etag")
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": fault["value"] if fault else f'"{blob.sha256}"'}
        request.reply(302, b"", headers | linked | {"Location": f"{request.hub.cdn}/lfs/get/{blob.sha256}/{path}"})


@route("GET HEAD", r"/lfs/get/(\w+)/.*")
def large_get(request: Request, oid: str) -> None:
    request.send_file(request.hub.large[oid], {"ETag": f'"{oid}"'})
