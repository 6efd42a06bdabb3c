"""An adapter and its base as a plain Transformers checkpoint that needs no speft to load.

The base's files are copied (or fetched) one by one and the changed entries are written into the copies, so the memory
needed is that of one tensor, and every byte that the adapter does not change is the base's. The arithmetic is that of
`SparseAdapter.apply`: the logits are the same bits.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from speft_core import SparseAdapter, UserError
from speft_core.files import atomic_folder
from speft_core.fingerprint import check_fingerprint
from speft_core.writing import gather, write_sum

from .addresses import public_base
from .card import CardFields, plain
from .checkpoint import LM_HEAD, SINGLE, Checkpoint, write_index
from .export_config import made_config, write_configs
from .names import CHECKPOINT_FILES, HEADS, TEMPLATES, check_place
from .pulling import Progress, _fetch, check_folder
from .sources import base_files, base_folder, base_name
from .widen import NARROW, widen

# What Transformers' classifiers have on top of a body: only such a tensor may be one that the base has not. An output layer is never
# missing from a base, and what a base calls otherwise (a router, a norm) would be overwritten on load by the base's own.
HEAD = re.compile(
    r"(score|classifier|pre_classifier|classification_head|qa_outputs|head|dense|sequence_summary|logits_proj|(\w+\.)?pooler)\..+"
)
Say = Callable[[str], None]
"""Called with one line that a person should know."""


def export(
    adapter: str | Path,
    out: str | Path,
    base: str | None = None,
    *,
    head: str | None = None,
    dtype: str | None = None,
    check_base: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Write the checkpoint of `adapter` (a folder) on its base into the new folder `out`.

    base: a folder, a repository, or what the adapter names. head: for a multi-head folder, the task whose head to take.
    dtype: "float32" to widen the base's 16-bit weights first; else each tensor keeps the base's dtype.
    UserError when the base is not the adapter's (unless `check_base` is False), or has no tensor that the adapter changes.
    """
    folder, out = Path(adapter), Path(out)
    if dtype not in (None, "float32"):
        raise UserError(f"--dtype must be float32, or left out for the base's own, got {dtype!r}")
    loaded, labels = _loaded(folder, head)
    chosen = base_name(loaded.config.base_model_name_or_path, base, folder)
    local = base_folder(chosen)
    if local is not None and local.resolve() == out.resolve():
        raise UserError(f"{out} is the base itself, which is never replaced; name a new folder")
    check_place(out, force, "checkpoint", "config.json")
    with atomic_folder(out, check=lambda: check_place(out, force, "checkpoint", "config.json")) as beside:
        _copy_base(chosen, None if base else loaded.config.base_model_revision, beside, progress)
        if dtype:
            widen(beside)
        checkpoint = Checkpoint(beside)
        narrowed: set[torch.dtype] = set()
        for i, (name, delta) in enumerate(loaded.deltas.items()):
            narrowed |= _change(checkpoint, name, delta, loaded, chosen, check_base)
            if progress:
                progress("writing", i + 1, len(loaded.deltas))
        narrowed |= _place_heads(checkpoint, loaded, beside, chosen)
        notes = write_configs(beside, made_config(folder, loaded.dense, checkpoint.config, labels), dtype)
        rounded = _rounded(narrowed)
        (beside / "README.md").write_text(_card(loaded, chosen, out.name, rounded), encoding="utf-8")
    for line in [*([f"{rounded}; --dtype float32 keeps them"] if rounded else []), *notes]:
        if say:
            say(line)
    return out


def _loaded(folder: Path, head: str | None) -> tuple[SparseAdapter, dict[str, Any] | None]:
    """The adapter, of a multi-head folder with the head that was chosen; and what that head's outputs mean."""
    loaded = check_folder(folder)
    heads: dict[str, dict[str, torch.Tensor]] = {}
    labels: dict[str, dict[str, Any]] = {}
    if head is not None or (folder / HEADS).is_file():
        from speft_core.multihead import load_heads, load_labels

        heads, labels = load_heads(folder)[0], load_labels(folder)
    if head is None:
        if any(heads.values()):
            raise UserError(f"{folder} has several heads and a checkpoint has one; choose with --head {' or '.join(heads)}")
        return loaded, None
    if head not in heads:
        raise UserError(f"{folder} has no head {head!r}; it has {', '.join(heads)}")
    return SparseAdapter(loaded.deltas, dict(heads[head]), loaded.config, loaded.fingerprint), labels[head]


def _copy_base(base: str, revision: str | None, beside: Path, progress: Progress | None) -> None:
    local = base_folder(base)
    if local is None:
        reference, tree = base_files(base, revision)
        for name, entry in tree.items():
            _fetch(reference, name, entry, beside / name, progress)
        return
    wanted = {f.name for f in Checkpoint(local).files}
    for file in sorted((*local.iterdir(), *local.glob(f"{TEMPLATES}/*"))):
        name = file.relative_to(local).as_posix()
        if file.is_file() and CHECKPOINT_FILES.fullmatch(name) and (file.suffix != ".safetensors" or name in wanted):
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, beside / name)
            if progress:
                progress(name, file.stat().st_size, file.stat().st_size)


def _missing(base: str, name: str) -> UserError:
    return UserError(f"base {base} has no tensor for the adapter's {name}; it is another base, or stored in another layout")


def _change(
    checkpoint: Checkpoint, name: str, delta: Any, adapter: SparseAdapter, base: str, check_base: bool
) -> set[torch.dtype]:
    """Write one tensor's changes; the 16-bit dtype to which weights that were trained wider are rounded by it, if so."""
    keys = checkpoint.keys_of(name)
    if not keys:
        raise _missing(base, name)
    record = adapter.fingerprint.get(name) or {}
    for key in keys:
        with checkpoint.tensor(key, write=True) as weight:
            if tuple(weight.shape) != delta.shape or not weight.is_floating_point():
                found = f"{tuple(weight.shape)} of {weight.dtype}"
                raise UserError(f"this adapter is for another base: {name} has shape {delta.shape}, {key} in {base} is {found}")
            base_K = gather(weight, delta.indices_K)
            if check_base:
                check_fingerprint(name, weight, delta, record, base, base_K)
            write_sum(weight, delta.indices_K, base_K, delta.values_K)
    stored = {checkpoint.places[key].dtype for key in keys}
    return stored & set(NARROW) if _was_wide(record, delta.values_K.dtype) else set()


def _was_wide(record: Collection[str], dtype: torch.dtype) -> bool:
    """Whether a tensor was trained in float32 or wider: by its fingerprint's hashes or, where there are none, by what was learned."""
    hashes = {key for key in record if key.startswith("base_")}
    return bool(hashes & {"base_float32", "base_float64"}) if hashes else dtype.itemsize > 2


def _rounded(narrowed: Collection[torch.dtype]) -> str:
    """What to say of weights that were rounded to `narrowed`; nothing when none was."""
    if not narrowed:
        return ""
    stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrowed))
    return (
        f"the adapter was trained in float32 and the base is stored in {stored}, to which the changed weights are rounded:"
        " figures measured in float32 are not exactly this checkpoint's"
    )


def _place_heads(checkpoint: Checkpoint, adapter: SparseAdapter, beside: Path, base: str) -> set[torch.dtype]:
    """Whole tensors: over the base's where it has them, heads that it has not into a file of their own with an index.

    Returns the 16-bit dtypes to which tensors that were trained wider are rounded.
    """
    new: dict[str, torch.Tensor] = {}
    stored: set[torch.dtype] = set()
    common = next((p.dtype for p in checkpoint.places.values() if p.dtype.is_floating_point), torch.float32)
    records = {key for record in adapter.fingerprint.values() for key in record}
    for name, tensor in adapter.dense.items():
        keys = checkpoint.keys_of(name)
        if name.endswith(LM_HEAD) and checkpoint.tied:
            raise UserError(f"{name} is the embeddings once more in base {base}: a head of its own would change those, too")
        for key in keys:
            with checkpoint.tensor(key, write=True) as weight:
                if weight.shape != tensor.shape:
                    raise UserError(
                        f"{name} has shape {tuple(tensor.shape)}, in the base {tuple(weight.shape)}; use a base without a head"
                    )
                weight.copy_(tensor)
        if not keys:
            whole = not name.endswith(".bias") or name.removesuffix("bias") + "weight" in adapter.dense
            if not (HEAD.fullmatch(name) and whole):
                raise _missing(base, name)
            new[name] = tensor.to(common).contiguous().clone()
        if tensor.dtype.itemsize > 2 and _was_wide(records, tensor.dtype):
            stored |= {checkpoint.places[key].dtype for key in keys} or {common}
    if new:
        _write_new(checkpoint, new, beside)
    return stored & set(NARROW)


def _write_new(checkpoint: Checkpoint, new: dict[str, torch.Tensor], beside: Path) -> None:
    files: dict[str, list[str]] = {}
    for key, place in checkpoint.places.items():
        files.setdefault(place.file.name, []).append(key)
    if SINGLE in files:  # Transformers would look no further than this name
        body = _free_name("model-body", files)
        (beside / SINGLE).rename(beside / body)
        files[body] = files.pop(SINGLE)
    heads = _free_name("model-heads", files)  # the base may be an export itself
    safetensors.torch.save_file(new, beside / heads, metadata={"format": "pt"})
    write_index(beside, files | {heads: list(new)})


def _free_name(stem: str, taken: Collection[str]) -> str:
    name, i = f"{stem}.safetensors", 1
    while name in taken:
        i += 1
        name = f"{stem}-{i}.safetensors"
    return name


def _card(adapter: SparseAdapter, base: str, name: str, note: str) -> str:
    """A short card: what it was made of, and what a reader of its figures should know."""
    metadata: dict[str, Any] = {"library_name": "transformers"}
    on_hub = None if base.startswith("file:") or base_folder(base) else base.partition("@")[0]
    if on_hub:
        metadata |= {"base_model": on_hub, "base_model_relation": "finetune"}
    metadata["tags"] = ["speft", "sparse"]
    CardFields(base_model=on_hub).check()
    body = (
        f"# {plain(name)}\n\n{plain(public_base(base) or 'the base model')} with {adapter.nnz:,} single weights changed by a sparse"
        f" adapter (selection: {plain(adapter.config.metric or 'not recorded')}), exported as a plain checkpoint:"
        " loads in Transformers, lm-eval and vLLM without speft.\n"
    )
    if note:
        body += f"\nNote that {plain(note, 400)}.\n"
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{body}"
