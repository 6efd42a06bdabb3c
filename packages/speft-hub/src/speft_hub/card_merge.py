"""Keeping what people wrote in a card while its generated parts are renewed.

A card is YAML metadata, then text in which generated sections stand between two comments, then one last comment that
remembers what was generated (a hash of each section and metadata value). So an edited section or value is told from an old
one: edited ones stay as they are, deleted ones stay away, old ones are replaced, and all text outside the sections is people's.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from speft_core import UserError

from .card import Rendered
from .licences import HUB_ID

FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.S)
SECTION = re.compile(r"<!-- speft:begin (\w+) -->\n(.*?)\n?<!-- speft:end \1 -->", re.S)
RECORD = re.compile(r"\n*<!-- speft:card (\{[^\n]*\}) -->[ \t]*\n*")
# What a training run writes: text nobody has touched, as its hash proves, so nothing in it is a person's.
DRAFT = re.compile(r"<!-- speft:draft ([0-9a-f]{12}) -->\s*\Z")
ALWAYS_OURS = ("library_name", "base_model_relation")


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Card:
    """A card taken apart: metadata, the text with its sections in place, and what was recorded when it was generated."""

    metadata: dict[str, Any]
    body: str
    sections: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def state(self) -> str:
        """A hash of everything a person may have changed."""
        outside = SECTION.sub(lambda found: f"<{found[1]}>", self.body)
        return _hash([self.metadata, " ".join(outside.split()), {n: _hash(t) for n, t in self.sections.items()}])

    def edited(self) -> bool:
        """Whether anything differs from what was generated last."""
        return self.state() != self.record.get("state")


def is_draft(text: str) -> bool:
    """Whether a card is what a training run wrote, untouched."""
    found = DRAFT.search(text)
    return found is not None and _hash(text[: found.start()]) == found[1]


def take_apart(text: str, where: str) -> Card:
    """Read a card; UserError when its metadata is no YAML mapping."""
    text = text.replace("\r\n", "\n")
    front = FRONT.match(text)
    metadata: Any = {}
    if front:
        try:
            metadata = yaml.safe_load(front[1]) or {}
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
            raise UserError(f"{where}: the metadata at the top of README.md is not readable YAML") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: the metadata at the top of README.md must be a mapping, got {type(metadata).__name__}")
    body = text[front.end() :] if front else text
    record: dict[str, Any] = {}
    if found := list(RECORD.finditer(body)):
        last = found[-1]  # not always at the end: people write below it
        try:
            loaded = json.loads(last[1])
            record = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            record = {}
        body = RECORD.sub("\n\n", body)
    return Card(metadata, body.strip("\n"), dict(SECTION.findall(body)), record)


def put_together(metadata: dict[str, Any], body: str, record: dict[str, Any]) -> str:
    """The text of a card; the record of what people have goes last."""
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    card = Card(metadata, body, dict(SECTION.findall(body)))
    record = record | {"state": card.state()}
    return f"---\n{front}---\n\n{body.strip()}\n\n<!-- speft:card {json.dumps(record, sort_keys=True)} -->\n"


def _wrapped(name: str, text: str) -> str:
    safe = text.replace("<!-- speft:", "<!-- speft ")
    return f"<!-- speft:begin {name} -->\n{safe}\n<!-- speft:end {name} -->"


def _known(record: dict[str, Any], kind: str) -> dict[str, str]:
    known = record.get(kind)
    return known if isinstance(known, dict) else {}


def merge_cards(
    new: Rendered, local: str | None, hub: str | None, prefer: str = "auto", explicit: set[str] | None = None
) -> str:
    """The card to publish: `new` inside, what people wrote in the folder's card or the repository's around it.

    `prefer` ("auto", "local", "hub") settles which of two edited cards is kept; "auto" raises UserError for that case.
    `explicit`: metadata keys that the caller said this time, which win over the card's.
    """
    check_prefer(prefer)
    old = _which(local, hub, prefer)
    if old is None:
        body = f"# {new.title}\n\n" + "\n\n".join(_wrapped(n, t) for n, t in new.sections.items())
        return put_together(new.metadata, body, _record(new, {}))
    metadata = _merge_metadata(new.metadata, old, explicit or set())
    if "base_model" not in new.metadata and not _all_ids(metadata.get("base_model")):
        metadata.pop("base_model", None)  # a path, or a name that the Hub cannot know
        metadata.pop("base_model_relation", None)
    return put_together(metadata, _merge_body(new, old), _record(new, old.record))


def _all_ids(base: Any) -> bool:
    return all(isinstance(b, str) and "/" in b and HUB_ID.fullmatch(b) for b in (base if isinstance(base, list) else [base]))


def _record(new: Rendered, old: dict[str, Any]) -> dict[str, Any]:
    sections = _known(old, "sections") | {n: _hash(t) for n, t in new.sections.items()}
    meta = _known(old, "meta") | {k: _hash(v) for k, v in new.metadata.items()}
    return {"sections": sections, "meta": meta}


def check_prefer(prefer: str) -> None:
    """UserError unless `prefer` is a way to settle which of two cards is kept."""
    if prefer not in ("auto", "local", "hub"):
        raise UserError(f"--keep must be auto, local or hub, got {prefer!r}")


def _which(local: str | None, hub: str | None, prefer: str) -> Card | None:
    """The card whose people's parts are kept."""
    local = None if local and is_draft(local) else local
    if not local and not hub:
        return None
    if not hub or not local:
        return take_apart(hub or local or "", "the repository" if hub else "the folder")
    ours, theirs = take_apart(local, "the folder"), take_apart(hub, "the repository")
    if prefer != "auto":
        return ours if prefer == "local" else theirs
    ours_new = ours.edited() and ours.state() != theirs.record.get("state")
    theirs_new = theirs.edited() and theirs.state() != ours.record.get("state")
    if ours_new and theirs_new and ours.state() != theirs.state():
        raise UserError("README.md was edited both in the folder and in the repository; choose with --keep local or --keep hub")
    return ours if ours_new and not theirs_new else theirs


def _merge_metadata(new: dict[str, Any], old: Card, explicit: set[str]) -> dict[str, Any]:
    known = _known(old.record, "meta")
    merged = dict(old.metadata)
    for key in [k for k in known if k in merged and k not in new and _hash(merged[k]) == known[k]]:
        if key not in ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "base_model"):
            del merged[key]  # generated before, no longer true, never touched by a person
    for key, value in new.items():
        if key in ALWAYS_OURS or key in explicit:
            merged[key] = value
        elif key not in merged:
            if key not in known:  # else a person deleted it
                merged[key] = value
        elif _hash(merged[key]) == known.get(key):
            merged[key] = value
        elif key == "tags" and isinstance(merged[key], list):
            merged[key] = list(dict.fromkeys([*merged[key], *value]))
    return merged


def _merge_body(new: Rendered, old: Card) -> str:
    known = _known(old.record, "sections")

    def renewed(found: re.Match[str]) -> str:
        name, text = found[1], found[2]
        safe_hash = known.get(name)
        untouched = _hash(text.replace("<!-- speft ", "<!-- speft:")) == safe_hash or _hash(text) == safe_hash
        if not untouched:
            return found[0]
        return _wrapped(name, new.sections[name]) if name in new.sections else ""

    body = SECTION.sub(renewed, old.body)
    fresh = [n for n in new.sections if n not in old.sections and n not in known]
    return "\n\n".join([body.strip(), *(_wrapped(n, new.sections[n]) for n in fresh)])
