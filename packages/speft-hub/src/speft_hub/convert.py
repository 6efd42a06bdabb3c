"""Sparse adapters of others: PEFT's SHiRA (from and to), and SpaRTA's `sparse_deltas.pt` (from).

Neither format stores the shapes of the tensors it changes, so both need the base checkpoint, whose headers have them.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.files import atomic_folder, check_readable
from speft_core.fingerprint import fingerprint
from speft_core.gaps import index_dtype
from speft_core.multihead_files import load_heads

from .checkpoint import Checkpoint
from .names import HEADS, check_place
from .unpickle import read_pickle

PEFT_PREFIX = "base_model.model."
FORMATS = ("speft", "shira", "sparta")


def detect(folder: Path) -> str:
    """Which format a folder holds."""
    if any((folder / f"sparse_deltas.{kind}").is_file() for kind in ("pt", "safetensors")):
        return "sparta"
    config = _json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else {}
    if config.get("format") == "speft":
        return "speft"
    if config.get("peft_type") == "SHIRA":
        return "shira"
    told = f"a PEFT adapter of type {config['peft_type']}" if "peft_type" in config else "no adapter that is known"
    raise UserError(f"{folder} is {told}; what can be converted: {', '.join(FORMATS)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(loaded).__name__}")
    return loaded


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        check_readable(path)
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise UserError(f"{path} is no readable safetensors file: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from None


def _delta(
    name: str, positions_NK: torch.Tensor, values_K: torch.Tensor, base: Checkpoint
) -> tuple[SparseDelta, dict[str, Any]]:
    """Positions given one row a dimension, in any order, as a checked delta with the fingerprint of its base."""
    keys = base.keys_of(name)
    if not keys:
        raise UserError(f"{name}: the base {base.folder} has no such tensor; it is another base")
    shape = base.places[keys[0]].shape
    if (
        positions_NK.dim() != 2
        or positions_NK.shape[0] != len(shape)
        or positions_NK.shape[1] != values_K.numel()
        or values_K.dim() != 1
    ):
        raise UserError(
            f"{name}: positions of shape {tuple(positions_NK.shape)} do not fit {values_K.numel()} values in {shape}"
        )
    rows = positions_NK.long()
    for size, row_K in zip(shape, rows, strict=True):
        if row_K.numel() and not (int(row_K.min()) >= 0 and int(row_K.max()) < size):
            raise UserError(f"{name}: positions must lie within {shape}, got {int(row_K.min())} to {int(row_K.max())}")
    flat_K = torch.zeros(values_K.numel(), dtype=torch.int64)
    for size, row_K in zip(shape, rows, strict=True):
        flat_K = flat_K * size + row_K
    order_K = torch.argsort(flat_K, stable=True)
    delta = SparseDelta(flat_K[order_K].to(index_dtype(math.prod(shape))), values_K[order_K].contiguous(), shape).check(name)
    with base.tensor(keys[0]) as weight:
        return delta, fingerprint(weight, delta.indices_K)


def from_shira(folder: Path, base: Checkpoint) -> SparseAdapter:
    """A SHiRA adapter as PEFT saves it."""
    config, tensors = _json(folder / "adapter_config.json"), _tensors(folder / "adapter_model.safetensors")
    deltas, dense, prints = {}, {}, {}
    for key in sorted(k for k in tensors if k.startswith(PEFT_PREFIX)):
        module, _, kind = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if kind == "shira_weight":
            name = f"{module}.weight"
            positions = tensors.get(f"{PEFT_PREFIX}{module}.shira_indices")
            if positions is None:
                raise UserError(f"{folder}: {module} has values but no shira_indices")
            deltas[name], prints[name] = _delta(name, positions, tensors[key], base)
        elif kind != "shira_indices":
            dense[key.removeprefix(PEFT_PREFIX)] = tensors[key]
    if not deltas:
        raise UserError(f"{folder}: no tensor called {PEFT_PREFIX}….shira_weight found")
    made = AdapterConfig(
        base_model_name_or_path=config.get("base_model_name_or_path"),
        base_model_revision=config.get("revision"),
        task_type=config.get("task_type"),
        metric="random" if config.get("mask_type") == "random" else config.get("mask_type"),
        scope="local",
        budget={"r": config.get("r")},
        targets=sorted(config.get("target_modules") or []) if isinstance(config.get("target_modules"), list) else [],
        extra={"converted_from": "PEFT SHiRA"},
    )
    return SparseAdapter(deltas, dense, made, prints).check()


def to_shira(adapter: SparseAdapter, out: Path, force: bool = False) -> None:
    """Write a SHiRA adapter that PEFT loads; UserError where the counts are not r·(rows + columns) with one r."""
    ranks: dict[str, float] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, delta in adapter.deltas.items():
        if len(delta.shape) != 2 or not name.endswith(".weight"):
            raise UserError(f"SHiRA changes weights of linear layers alone, this adapter changes {name} of shape {delta.shape}")
        rows, columns = delta.shape
        ranks[name] = delta.nnz / (rows + columns)
        flat_K = delta.indices_K.long()
        module = PEFT_PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.shira_weight"] = delta.values_K.clone()
        tensors[f"{module}.shira_indices"] = torch.stack([flat_K // columns, flat_K % columns]).int()
    first = next(iter(ranks), None)
    odd = next((n for n, r in ranks.items() if first is None or r != ranks[first] or r != int(r) or r < 1), None)
    if first is None or odd:
        name = odd or "no tensor"
        why = f"{name} has {adapter.deltas[odd].nnz:,} of {adapter.deltas[odd].shape}" if odd else "there are none"
        raise UserError(f"SHiRA needs r·(rows + columns) entries in every matrix, with one whole r: {why}")
    for name, tensor in adapter.dense.items():
        tensors[PEFT_PREFIX + name] = tensor.clone()
    config = {
        "peft_type": "SHIRA",
        "task_type": adapter.config.task_type,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "revision": adapter.config.base_model_revision,
        "r": int(ranks[first]),
        "mask_type": "random",
        "inference_mode": True,
        "target_modules": sorted(n.removesuffix(".weight") for n in adapter.deltas),
        "init_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": sorted({n.rpartition(".")[0] for n in adapter.dense}) or None,
    }
    with atomic_folder(out, check=partial(check_place, out, force)) as beside:
        safetensors.torch.save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sparta_file(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """`<stem>.safetensors` or `<stem>.pt` by names like "indices\\tNAME"."""
    if (folder / f"{stem}.safetensors").is_file():
        found = _tensors(folder / f"{stem}.safetensors")
        return {k.replace(".", "\t", 1) if k.startswith(("indices.", "deltas.")) else k: v for k, v in found.items()}
    return {k: v for k, v in read_pickle(folder / f"{stem}.pt").items() if isinstance(v, torch.Tensor)}


def from_sparta(folder: Path, base: Checkpoint) -> SparseAdapter:
    """A SpaRTA adapter: sparse deltas of all parameters, and for classifiers the start of the head plus its change."""
    stored = _sparta_file(folder, "sparse_deltas")
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if any((folder / f"new_embeddings_init.{kind}").is_file() for kind in ("pt", "safetensors")):
        raise UserError(
            f"{folder} adds tokens to the vocabulary, which a sparse adapter cannot; export that model and use `diff`"
        )
    deltas, dense, prints = {}, {}, {}
    for key in sorted(k for k in stored if k.startswith("deltas\t")):
        name, values = key.partition("\t")[2], stored[key]
        positions = stored.get(f"indices\t{name}")
        if positions is None or positions.dim() != 2:
            raise UserError(f"{folder}: {name} has deltas but no indices, or not one row an entry")
        if name == "score.weight":
            start = next(iter(_sparta_file(folder, "head_init").values()))
            if values.numel() != start.numel():
                raise UserError(
                    f"{folder}: the head has {start.numel()} entries and {values.numel()} changes; it must be whole"
                )
            dense[name] = (start.float() + values.float().view(start.shape)).to(start.dtype)
        elif values.numel():
            deltas[name], prints[name] = _delta(name, positions.T, values, base)
    if not deltas and not dense:
        raise UserError(f"{folder}: sparse_deltas holds no change")
    made = AdapterConfig(
        base_model_name_or_path=config.get("sparta_pretrained_model") or config.get("_name_or_path"),
        task_type="SEQ_CLS" if dense else "CAUSAL_LM",
        metric="random",
        targets=["body"],
        extra={"converted_from": "SpaRTA"},
    )
    return SparseAdapter(deltas, dense, made, prints).check()


READERS = {"shira": from_shira, "sparta": from_sparta}


def convert(source: str | Path, out: str | Path, to: str = "speft", base: str | Path | None = None, force: bool = False) -> str:
    """Convert the adapter in `source` into the new folder `out`; returns the format that `source` had.

    to: "speft", or "shira" for a speft adapter whose counts allow it. base: the folder of the base checkpoint, needed to read
    the formats of others.
    """
    source, out = Path(source), Path(out)
    kind = detect(source)
    if to not in ("speft", "shira"):
        raise UserError(f"--to must be speft or shira, got {to!r}")
    if kind == to:
        raise UserError(f"{source} is a {to} adapter already")
    check_place(out, force)
    if kind == "speft":
        heads = load_heads(source)[0] if (source / HEADS).is_file() else {}
        if any(heads.values()):
            tasks = ", ".join(heads)
            raise UserError(f"{source} has heads of several tasks ({tasks}), and a SHiRA adapter has one; convert one that it was made of")
        to_shira(SparseAdapter.load(source), out, force)
        return kind
    if base is None:
        raise UserError(f"{source} stores no shapes; give --base FOLDER, the checkpoint it was trained on")
    adapter = READERS[kind](source, Checkpoint(base))
    if to == "shira":
        to_shira(adapter, out, force)
        return kind
    with atomic_folder(out, check=partial(check_place, out, force)) as beside:
        adapter.save(beside)
    return kind
