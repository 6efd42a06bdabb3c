"""Where an adapter or a base model is: a folder, a repository, or a name that another package knows."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from speft_core import UserError

from . import names
from .addresses import Reference, is_reference, parse
from .checkpoint import HEADER_LIMIT, INDEX, weight_files
from .names import CHECKPOINT_FILES
from .pulling import Progress, fetch_small, pull
from .registry import Entry, NotFound

PLUGINS = "speft.base_models"  # entry points: the part of a name before ":" -> function(name) -> folder


@contextmanager
def adapter_folder(text: str, progress: Progress | None = None) -> Iterator[Path]:
    """The folder of an adapter given as a path or a reference; a repository is pulled into a temporary folder, checked."""
    if not is_reference(text):
        folder = Path(text)
        if not folder.is_dir():
            raise UserError(f"no adapter at {text}: neither a folder nor a repository (owner/name, file:///path/owner/name)")
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="speft-") as room:
        yield pull(text, Path(room) / "adapter", progress=progress).path


@contextmanager
def adapter_folders(texts: list[str], progress: Progress | None = None) -> Iterator[list[Path]]:
    """Several at once."""
    with ExitStack() as stack:
        yield [stack.enter_context(adapter_folder(text, progress)) for text in texts]


def base_folder(base: str) -> Path | None:
    """The folder of a base model that is on this machine: a path, or a name that an installed package finds (bundled:…)."""
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    kind, colon, _ = base.partition(":")
    if colon and kind != "file":
        found = [e for e in importlib.metadata.entry_points(group=PLUGINS) if e.name == kind]
        if not found:
            raise UserError(f"base {base!r} is known to no installed package (pip install speft-train); or give --base FOLDER")
        return Path(found[0].load()(base))
    return None


def base_files(base: str, revision: str | None) -> tuple[Reference, dict[str, Entry]]:
    """The files of a base model in a repository, pinned to a commit; of its weights those that belong to the checkpoint."""
    reference = parse(base, base=True)
    registry, repo = reference.registry, reference.repo
    try:
        sha = registry.resolve(repo, reference.revision or revision or "main")
    except NotFound as error:
        raise UserError(f"base model: {error}; or give --base FOLDER") from None
    tree = {n: e for n, e in registry.tree(repo, sha).items() if CHECKPOINT_FILES.fullmatch(n)}
    if "config.json" not in tree or not any(n.endswith(".safetensors") for n in tree):
        raise UserError(f"base {base} must have config.json and .safetensors files; pickled weights are not read")
    pinned, index = Reference(registry, repo, sha), tree.get(INDEX)
    if index is not None and index.size > HEADER_LIMIT:
        raise UserError(f"base {base}: {INDEX} may have at most {HEADER_LIMIT:,} bytes, it has {index.size:,}")
    weights = [n for n in tree if n.endswith(".safetensors")]
    wanted = weight_files(weights, fetch_small(pinned, INDEX, index) if index else None, f"base {base}")
    return pinned, {n: e for n, e in tree.items() if n not in weights or n in wanted}


def base_name(adapter_base: str | None, told: str | None, folder: Path) -> str:
    """Which base to use: the one that was told, or the one that the adapter names."""
    if told:
        return told
    if adapter_base:
        return adapter_base
    raise UserError(f"{folder}: {names.CONFIG} names no base model; give --base FOLDER, --base name or --base owner/name")
