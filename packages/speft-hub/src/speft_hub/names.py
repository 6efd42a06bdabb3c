"""The files that a published adapter may consist of: exact names, and how large each may be.

Nothing else is ever sent or fetched, whatever lies in the folder or in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from speft_core import UserError

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICTURE, HEADS = "density.svg", "heads.json"
REQUIRED = (CONFIG, WEIGHTS)

# Each row: a pattern for the whole name, the largest size. Path parts never start with a dot but for `.eval_results`.
ALLOWED: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (re.escape(CONFIG), 64 * MB),
        (re.escape(WEIGHTS), 64 * GB),
        (re.escape(CARD), 1 * MB),
        (r"config\.json", 1 * MB),
        (r"training_config\.yaml", 1 * MB),
        (r"results\.json", 1 * MB),
        (r"LICENSE(\.md|\.txt)?", 1 * MB),
        (re.escape(PICTURE), 1 * MB),
        (re.escape(HEADS), 1 * MB),
        (r"heads/[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.safetensors", 16 * GB),
        (r"\.eval_results/[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.yaml", 64 * KB),
    )
)


def size_limit(name: str) -> int | None:
    """The largest size in bytes of a file called `name`, or None when no such file belongs to an adapter."""
    return next((limit for pattern, limit in ALLOWED if pattern.fullmatch(name)), None)


def choose(names: Iterable[str], where: str) -> list[str]:
    """Those of `names` that belong to an adapter, sorted; UserError when a required one is missing."""
    chosen = sorted(n for n in names if size_limit(n) is not None)
    missing = [n for n in REQUIRED if n not in chosen]
    if missing:
        raise UserError(f"{where} is not an adapter: it needs {' and '.join(REQUIRED)}, {' and '.join(missing)} not found")
    return chosen


def check_size(name: str, size: int, where: str) -> None:
    """UserError when a file of the adapter is larger than its kind may be."""
    limit = size_limit(name)
    if limit is not None and not 0 <= size <= limit:
        raise UserError(f"{where}: {name} may have at most {limit} bytes, got {size}")


def check_place(place: str | Path, force: bool, kind: str = "adapter", marker: str = CONFIG) -> Path:
    """The folder to write; UserError when it is a link or a file, holds something else, or holds a `kind` and is not to be replaced.

    What has no file `marker` is no `kind`, nor is an adapter a checkpoint for the base's config.json in it; neither is ever replaced.
    """
    place = Path(place)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"{place} is {'a link' if place.is_symlink() else 'a file'}; name a new folder")
    if place.exists() and any(place.iterdir()):
        if not (place / marker).is_file() or (marker != CONFIG and (place / CONFIG).exists()):
            raise UserError(f"{place} holds something that is no {kind} and is never replaced; name a new folder, or remove it")
        if not force:
            raise UserError(f"{place} holds another {kind}; pass --force to replace it, or name a new folder")
    return place
