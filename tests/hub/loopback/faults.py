"""What a Hub may do wrong, by accident or on purpose. `LoopbackHub.inject(kind, match, times, **detail)` arms one.

`match` is a piece of "METHOD /path"; the fault acts `times` times, then the server is honest again.

| kind | what the server does |
|---|---|
| status | answers with `code` (default 503) |
| corrupt | flips the last bit of a file |
| cut | drops the connection after `after` bytes of a file |
| flood | announces the true length of a file, or `announce` bytes, and sends `extra` more without end of chunk |
| slow | sleeps `seconds` before each 4 KiB of a file |
| commit | reports `sha` as the commit of a file or of the repository's information |
| etag | sends `value` as the ETag of a file |
| redirect | answers a file request with 302 to `to` |
| tree | lists `entries` besides (or, with `replace`, instead of) the files there are |
| pages | lists the tree in pages that never end |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("status", "corrupt", "cut", "flood", "slow", "commit", "etag", "redirect", "tree", "pages")


@dataclass
class Fault:
    kind: str
    match: str
    times: int
    detail: dict[str, Any] = field(default_factory=dict)
    seen: int = 0
