"""How the place of an adapter is written: owner/name on the Hub, file:///path/owner/name in a folder, @revision behind either."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from speft_core import UserError

from .folder import FolderRegistry
from .registry import Registry

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
BASE_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")  # the Hub's first models have no owner: gpt2
REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}")


def _hub() -> Registry:
    from .hub import HubRegistry  # its client takes a while to import

    return HubRegistry()


@dataclass(frozen=True)
class Reference:
    """A repository in a registry, at a revision."""

    registry: Registry
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.registry.address(self.repo) + (f"@{self.revision}" if self.revision else "")


def is_reference(text: str) -> bool:
    """Whether `text` names a repository rather than a folder of this machine."""
    return text.startswith("file:") or (not Path(text).exists() and REPO_ID.fullmatch(text.partition("@")[0]) is not None)


def parse(text: str, base: bool = False) -> Reference:
    """Read `owner/name[@revision]` (the Hub) or `file:///folder/owner/name[@revision]` (a folder registry).

    A literal `@` or other odd character in a folder's path is written percent-encoded. UserError for what is neither.
    base: of a base model, which on the Hub may be a `name` without an owner.
    """
    address, at, revision = text.partition("@")
    if at and not REVISION.fullmatch(revision):
        raise UserError(f"a revision is a branch, a tag or a commit, got {revision!r} in {text!r}")
    if address.startswith("file:"):
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(f"a folder registry is written file:///absolute/path, got {text!r}")
        return Reference(FolderRegistry(), unquote(parts.path).rstrip("/") or "/", revision or None)
    if not (BASE_ID if base else REPO_ID).fullmatch(address) or ".." in address:
        if base:
            raise UserError(f"a base is a folder, bundled:NAME, name, owner/name or file:///path/owner/name, got {text!r}")
        raise UserError(f"a repository is written owner/name[@revision] or file:///path/owner/name[@revision], got {text!r}")
    return Reference(_hub(), address, revision or None)


def check_revision(name: str, what: str) -> None:
    """UserError unless a new branch or tag can be written behind an address."""
    if not REVISION.fullmatch(name):
        raise UserError(
            f"{what} must start with a letter, digit or _ and hold only those, '.', '/' and '-', as v1 or main; got {name!r}"
        )


def public_base(told: str | None) -> str | None:
    """The base model's name as others may see it: a path of this machine, also a relative one that is there, is cut to its last part."""
    if not told:
        return None
    is_path = told.startswith(("/", ".", "~")) or "\\" in told or told.count("/") > 1 or os.path.exists(told)
    return Path(told.rstrip("/\\").replace("\\", "/")).name if is_path else told
