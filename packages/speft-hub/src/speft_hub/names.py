"""The files that a published adapter and an exported checkpoint may consist of: exact names, and how large each may be.

Nothing else is ever sent or fetched, whatever lies in the folder or in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from speft_core import UserError

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICTURE, HEADS = "density.svg", "heads.json"
REQUIRED = (CONFIG, WEIGHTS)

# The vocabulary files of Transformers' tokenizers (their VOCAB_FILES_NAMES), and Mistral's and Qwen's own.
VOCABULARY = re.compile(
    r"tokenizer\.json|tokenizer\.model(\.v\d+)?|vocab\.(json|txt)|merges\.txt|bpe\.codes|spiece\.model|spm(_char)?\.model"
    r"|sentencepiece(\.bpe)?\.model|(source|target)\.spm|tekken\.json|tiktoken\.model|[\w-]+\.tiktoken|dict\.txt|byte_maps\.json"
    r"|vocab-(src|tgt)\.json|(target|entity)_vocab\.json|word_(shape|pronunciation)\.json|emoji\.json|normalizer\.json"
    r"|prophetnet\.tokenizer"
)
# The files of a plain Transformers checkpoint that an export takes along. No pickles, no code.
CHECKPOINT_FILES = re.compile(
    r"[\w.-]*\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    rf"|{VOCABULARY.pattern}|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(json|jinja)|additional_chat_templates/[\w-][\w.-]*\.jinja"
    r"|((video_)?preprocessor|processor)_config\.json|LICENSE(\.md|\.txt)?|NOTICE(\.txt)?"
)
TEMPLATES = "additional_chat_templates"
FOLDERS = ("heads", ".eval_results", TEMPLATES)  # that an adapter or a checkpoint may have

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
HALF = re.compile(r"\.(.+)\.[a-z0-9_]+\.partial")  # what atomic_files writes beside a file


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


def is_checkpoint_file(name: str) -> bool:
    """Whether an export may have written a file of that name: what it takes along of a base, or its card."""
    return name == CARD or CHECKPOINT_FILES.fullmatch(name) is not None


def check_place(place: str | Path, force: bool, kind: str = "adapter", marker: str = CONFIG) -> Path:
    """The folder to write; UserError when it is a link or a file, holds something else, or holds a `kind` and is not to be replaced.

    What has no file `marker` is no `kind`, nor is a checkpoint what has no weights, or is an adapter with the base's config.json in
    it; none of these is ever replaced. Nor is a `kind` among whose files others lie: they would be lost with it.
    """
    place = Path(place)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"{place} is {'a link' if place.is_symlink() else 'a file'}; name a new folder")
    if place.exists() and any(place.iterdir()):
        is_adapter = marker == CONFIG
        own: Callable[[str], object] = size_limit if is_adapter else is_checkpoint_file
        whole = is_adapter or (any(place.glob("*.safetensors")) and not (place / CONFIG).exists())
        if not (whole and (place / marker).is_file()):
            raise UserError(f"{place} holds something that is no {kind} and is never replaced; name a new folder, or remove it")
        if odd := _odd(place, own):
            raise UserError(f"{place} holds {odd}, which is not the {kind}'s and is never removed; move it, or name a new folder")
        if not force:
            raise UserError(f"{place} holds another {kind}; pass --force to replace it, or name a new folder")
    return place


def _odd(place: Path, own: Callable[[str], object]) -> str | None:
    """The first entry of a folder that is not its own; of its folders only those are looked into that may belong there."""
    for path in sorted(place.iterdir()):
        folder = path.name in FOLDERS and path.is_dir() and not path.is_symlink()
        for entry in sorted(path.iterdir()) if folder else [path]:
            name = entry.relative_to(place).as_posix()
            half = HALF.fullmatch(name)  # what a save that was killed has left
            if entry.is_dir() or not own(half[1] if half else name):
                return name
    return None
