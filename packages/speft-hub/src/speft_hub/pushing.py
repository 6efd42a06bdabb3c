"""Publishing an adapter: an explicit list of checked files in one commit on top of a known parent."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speft_core import UserError

from . import names
from .addresses import Reference, check_revision, parse, public_base
from .card import CardFields, Rendered, read_text, render
from .card_merge import check_prefer, merge_cards
from .evaluation import EVAL_RESULTS
from .pulling import check_folder, fetch_small
from .registry import Content, Entry, NotFound, References, Registry, StaleParent, digest, same

SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})\b")


@dataclass(frozen=True)
class Pushed:
    """What a push did: the branch's commit, whether it is new, which files changed and which were left at home."""

    repo: str
    sha: str
    changed: list[str]
    deleted: list[str]
    left_out: list[str]


def collect(folder: str | Path) -> tuple[dict[str, Path], list[str]]:
    """The adapter's files in `folder` by name, and the names of everything else there. UserError for links among them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; push takes the folder of an adapter")
    found: dict[str, Path] = {}
    others: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        known = names.size_limit(name) is not None
        if stat.S_ISLNK(mode) and (known or name in ("heads", ".eval_results")):
            raise UserError(f"{path} is a link; what it points at would be published, push takes real files only")
        if stat.S_ISDIR(mode) and known:
            raise UserError(f"{path} is a folder, a file is expected there")
        if known and not stat.S_ISREG(mode):
            raise UserError(f"{path} is no regular file")
        if known:
            names.check_size(name, path.stat().st_size, str(folder))
            found[name] = path
        elif not stat.S_ISDIR(mode):
            others.append(name)
    names.choose(found, str(folder))
    return found, others


def _refuse_secrets(contents: Mapping[str, Content]) -> None:
    for name, content in contents.items():
        if name.endswith(".safetensors"):
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if SECRET.search(data):
            raise UserError(f"{name} holds what looks like an access token; it would be published, remove it")


def _public_config(folder: Path, base_model: str | None) -> bytes:
    """`adapter_config.json` as it is published: a base that is a local path becomes `base_model` or its last part."""
    text = (folder / names.CONFIG).read_bytes()
    config = json.loads(text)
    told = config.get("base_model_name_or_path")
    public = base_model or public_base(told)
    if told == public:
        return text
    old, new = json.dumps(told), json.dumps(public)
    return text.replace(f'"base_model_name_or_path": {old}'.encode(), f'"base_model_name_or_path": {new}'.encode(), 1)


def push(
    folder: str | Path,
    reference: str | Reference,
    *,
    branch: str | None = None,
    parent: str | None = None,
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
    fields: CardFields | None = None,
    card: str = "auto",
) -> Pushed:
    """Publish the adapter in `folder` to `owner/name` or `file:///…`, creating the repository when it is new.

    The adapter is loaded and checked first. Only an adapter's own files are sent, links are refused. The commit is made on
    top of `parent` (by default the branch's head when the push began), so that of two pushes at once the second is refused
    (StaleParent). Nothing is committed when nothing changed. `card`: whose edits of README.md to keep when both the
    folder's and the repository's were edited, "local" or "hub"; "auto" refuses to choose between two.
    """
    folder = Path(folder)
    reference = parse(reference) if isinstance(reference, str) else reference
    registry, repo = reference.registry, reference.repo
    branch = branch or reference.revision or "main"
    fields = fields or CardFields()
    for what, name in (("a branch", branch), ("a tag", tag)):
        if name is not None:
            check_revision(name, what)
    found, left_out = collect(folder)
    adapter = check_folder(folder)
    contents: dict[str, Content] = dict(found)
    contents[names.CONFIG] = _public_config(folder, fields.base_model)
    _refuse_secrets(contents)
    rendered = render(adapter, folder, registry.address(repo), fields)  # what is wrong with a card is told before anything is made
    check_prefer(card)
    if parent is not None:
        parent = registry.resolve(repo, parent)

    head = _commit_of(registry, repo, branch)
    start = head if head or branch == "main" else _commit_of(registry, repo, "main")  # None: a new repository
    tree = registry.tree(repo, start) if start else {}
    contents.update(_cards(rendered, folder, registry, repo, start or "", tree, fields, card))
    _refuse_secrets({names.CARD: contents[names.CARD]})
    changed = [n for n, c in contents.items() if n not in tree or not same(digest(c), tree[n])]
    deleted = [n for n in tree if _is_ours(n) and n not in contents]
    moves = bool(changed or deleted or (parent or start) != start)
    tagged = _tagged(registry, repo, branch, tag) if tag else None
    if tagged and (moves or tagged != start):
        raise UserError(f"{registry.address(repo)} has a tag {tag!r} at {tagged[:12]} already; tags do not move")

    # Nothing was written up to here, so that what is refused leaves nothing behind, not even an empty repository.
    head = head or _create(registry, repo, branch, start, private)
    sha = head
    if moves:
        title = message or f"Upload a sparse adapter ({adapter.nnz:,} parameters)"
        sha = registry.commit(repo, branch, parent or head, {n: contents[n] for n in changed}, deleted, title)
    if tag and not tagged:
        registry.tag(repo, tag, sha)
    return Pushed(registry.address(repo), sha, sorted(changed), sorted(deleted), left_out)


def _commit_of(registry: Registry, repo: str, branch: str) -> str | None:
    """The commit that a branch points at; None where there is no such branch or repository."""
    try:
        return registry.resolve(repo, branch)
    except NotFound:
        return None


def _is_ours(name: str) -> bool:
    """Whether a file that the folder lacks is deleted: an adapter's own, but for what people or other tools write beside it."""
    if name.startswith(".eval_results/"):
        return name == EVAL_RESULTS
    return names.size_limit(name) is not None and name not in (names.CARD, "LICENSE", "LICENSE.md", "LICENSE.txt")


def _create(registry: Registry, repo: str, branch: str, start: str | None, private: bool) -> str:
    """Make what is missing, the repository (`start` is None) or only the branch at `start`, and return the branch's commit."""
    late = StaleParent(f"{registry.address(repo)}: someone pushed to {branch} at the same time; pull and push again")
    if start is None:
        registry.create(repo, private)
        start = registry.resolve(repo, "main")
        if any(names.size_limit(name) is not None for name in registry.tree(repo, start)):  # not the empty first commit
            raise late
    if branch == "main":
        return start
    try:
        registry.branch(repo, branch, start)
    except UserError:
        if branch in registry.references(repo).branches:
            raise late from None
        raise
    return start


def _tagged(registry: Registry, repo: str, branch: str, tag: str) -> str | None:
    """The commit that has the tag already, None where it is free; UserError where a branch has that name."""
    try:
        there = registry.references(repo)
    except NotFound:
        there = References()
    if tag == branch or tag in there.branches:
        raise UserError(f"{registry.address(repo)} has {tag!r} already, as a branch; a tag needs another name")
    return registry.resolve(repo, tag) if tag in there.tags else None


def _cards(
    rendered: Rendered,
    folder: Path,
    registry: Registry,
    repo: str,
    head: str,
    tree: Mapping[str, Entry],
    fields: CardFields,
    prefer: str,
) -> dict[str, Content]:
    """The card, merged with what people wrote, its picture and the evaluation files."""
    local = read_text(folder / names.CARD) if (folder / names.CARD).is_file() else None
    hub = None
    if names.CARD in tree:
        hub = fetch_small(Reference(registry, repo, head), names.CARD, tree[names.CARD]).decode("utf-8", "replace")
    text = merge_cards(rendered, local, hub, prefer=prefer, explicit=fields.given())
    return {names.CARD: text.encode(), **{n: c.encode() for n, c in rendered.files.items()}}
