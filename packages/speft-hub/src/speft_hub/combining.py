"""`merge` and `multihead` over adapters given as folders or repositories."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speft_core import SparseAdapter, UserError
from speft_core.files import atomic_folder
from speft_core.merge import is_head
from speft_core.merge_files import AdapterFile, merge_folders
from speft_core.merge_report import Row
from speft_core.multihead_files import check_labels, kind_of_outputs, load_heads, save_heads

from . import names
from .addresses import is_reference, parse
from .card import CardFields, read_text, render
from .card_merge import merge_cards
from .export_config import LABEL_KEYS
from .pulling import Progress, check_folder
from .sources import adapter_folders

OF_A_HEAD = ("architectures", *LABEL_KEYS)  # keys of a config.json that speak of a model with its head
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pinned(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each source as it is fetched (repositories pinned to a commit) and as the provenance calls it, without local paths."""
    addresses, called = [], []
    for text in texts:
        if is_reference(text):
            reference = parse(text)
            sha = reference.registry.resolve(reference.repo, reference.revision or "main")
            addresses.append(f"{reference.registry.address(reference.repo)}@{sha}")
            public = "/".join(reference.repo.rsplit("/", 2)[-2:])
            called.append(f"{public}@{sha[:12]}")
        else:
            addresses.append(text)
            called.append(Path(text).resolve().name)
    return addresses, called


def merge_adapters(
    sources: Sequence[str],
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    dtype: str | None = None,
    **options: Any,
) -> tuple[list[Row], list[str]]:
    """Merge folders and repositories into the new folder `out`; options as of `speft_core.merge`.

    Returns the figures, and the names of the heads' tensors that differ between the adapters and were left out. UserError for a
    source with heads of several tasks, which would be lost.
    """
    out = names.check_place(out, force)
    kind = _dtype(dtype)
    addresses, called = pinned(sources)
    with adapter_folders(addresses, progress) as folders:
        _refuse_heads(folders, sources, "a merge")
        with atomic_folder(out, check=partial(names.check_place, out, force)) as beside:
            rows = _merge(folders, beside, dtype=kind, names=called, **options)
            adapter = SparseAdapter.load(beside)
            apart: list[str] = adapter.config.extra["merge"].get("heads_left_apart", [])
            _take_config(folders, beside, OF_A_HEAD if any(map(is_head, apart)) else ())
            write_card(beside, out.name, adapter=adapter)
    return rows, apart


def _merge(folders: Sequence[Path], beside: Path, **options: Any) -> list[Row]:
    """Merge into the folder that `atomic_folder` gave, which keeps its place: by its lock others know that we are at work."""
    body = beside / "body"
    rows = merge_folders(folders, body, **options)
    for file in body.iterdir():
        file.rename(beside / file.name)
    body.rmdir()
    return rows


def _refuse_heads(folders: Sequence[Path], sources: Sequence[str], command: str) -> None:
    for folder, source in zip(folders, sources, strict=True):
        heads = load_heads(folder)[0] if (folder / names.HEADS).is_file() else {}
        if any(heads.values()):  # else all are the model's own
            tasks = ", ".join(heads)
            raise UserError(
                f"{source} has heads of several tasks ({tasks}), which {command} would lose; give the adapters that it was made of"
            )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name] if name else None


def multihead(
    sources: Sequence[str],
    out: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    dtype: str | None = None,
    **options: Any,
) -> dict[str, str]:
    """Merge the bodies of several adapters and keep every head, in the new folder `out`; returns task -> kind of head.

    tasks: what the heads are called, one for each source; by default the last parts of the sources' names.
    """
    out = names.check_place(out, force)
    kind = _dtype(dtype)
    addresses, called = pinned(sources)
    tasks = list(tasks) if tasks else [re.sub(r"[^A-Za-z0-9_-]", "_", c.partition("@")[0].rsplit("/", 1)[-1]) for c in called]
    if len(tasks) != len(sources) or len(set(tasks)) != len(tasks):
        raise UserError(
            f"tasks must be one distinct name for each adapter ({len(sources)}), got {', '.join(tasks)}; pass --task for each"
        )
    with adapter_folders(addresses, progress) as folders:
        _refuse_heads(folders, sources, "another multi-head model")
        with atomic_folder(out, check=partial(names.check_place, out, force)) as beside:
            _merge(folders, beside, dtype=kind, names=called, keep_dense=False, **options)
            kinds = _save_heads(dict(zip(tasks, folders, strict=True)), beside)
            _take_config(folders, beside)
            check_folder(beside)
            write_card(beside, out.name)
    return kinds


def _save_heads(folders: Mapping[str, Path], beside: Path) -> dict[str, str]:
    """Write each task's head, the dense tensors of its adapter, with what its outputs mean; returns task -> kind."""
    heads, kinds, labels = {}, {}, {}
    with ExitStack() as stack:
        for task, folder in folders.items():
            head = heads[task] = AdapterFile(folder, stack).dense
            causal = not head or any(name.endswith("lm_head.weight") for name in head)
            labels[task] = {} if causal else _labels(task, _config(folder), head)
            kinds[task] = "causal" if causal else kind_of_outputs(head.values(), labels[task])
        save_heads(beside, heads, kinds, labels)
    return kinds


def _labels(task: str, config: dict[str, Any], head: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a head's outputs mean, by the config.json beside its adapter; nothing where that speaks of another head."""
    sizes = {tensor.shape[0] for tensor in head.values() if tensor.dim()}
    if "id2label" not in config and 2 not in sizes:  # Transformers leaves out what it takes as given: two classes
        return {}
    try:
        return check_labels(task, config, head)
    except UserError:
        return {}


def _config(folder: Path) -> dict[str, Any]:
    """The model's config.json of an adapter's folder; empty where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not readable JSON")
    return config


def _take_config(folders: Sequence[Path], beside: Path, without: Collection[str] = ()) -> None:
    """The model's config.json of the first source that has one, when all that have one are of one kind of model.

    without: keys that are not true of what was made.
    """
    found = []
    for folder in folders:
        if (folder / "config.json").is_file():
            config = _config(folder)
            found.append((config.get("model_type"), str(config.get("architectures")), folder))
    if found and len({f[:2] for f in found}) == 1:
        config = {k: v for k, v in _config(found[0][2]).items() if k not in without}
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, address: str, fields: CardFields | None = None, adapter: SparseAdapter | None = None) -> Path:
    """Write or renew README.md and its picture in an adapter's folder, keeping what a person wrote there."""
    fields = fields or CardFields()
    rendered = render(adapter or SparseAdapter.load(folder), folder, address, fields)
    card = folder / names.CARD
    local = read_text(card) if card.is_file() else None
    text = merge_cards(rendered, local, None, explicit=fields.given())
    for name, content in rendered.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    card.write_text(text, encoding="utf-8")
    return card
