"""What an adapter is, in figures, and whether it fits a base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from speft_core import SparseAdapter, UserError
from speft_core.fingerprint import check_fingerprint, check_shape
from speft_core.writing import gather

from . import names
from .checkpoint import Checkpoint
from .picture import density_table
from .pulling import check_folder


def describe(folder: str | Path) -> dict[str, Any]:
    """Everything that `inspect` shows; the adapter is loaded and checked for it."""
    folder = Path(folder)
    adapter = check_folder(folder)
    config = adapter.config
    weights = folder / names.WEIGHTS
    numel = sum(d.numel for d in adapter.deltas.values())
    dense = {n: list(t.shape) for n, t in adapter.dense.items()}
    trained = adapter.nnz + sum(t.numel() for t in adapter.dense.values())
    found: dict[str, Any] = {
        "base_model": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "task_type": config.task_type,
        "metric": config.metric,
        "scope": config.scope,
        "budget": config.budget,
        "seed": config.seed,
        "targets": config.targets,
        "parameters": adapter.nnz,
        "of": numel,
        "density": adapter.nnz / max(1, numel),
        "tensors": len(adapter.deltas),
        "dtypes": sorted({str(d.values_K.dtype).removeprefix("torch.") for d in adapter.deltas.values()}),
        "dense": dense,
        "bytes": weights.stat().st_size,
        "bytes_per_parameter": weights.stat().st_size / max(1, trained),
        "sha256": _sha256(weights),
        "library_versions": config.library_versions,
        "matrices": [{"name": n, "layers": c, "kept": k, "of": of} for n, c, k, of in density_table(adapter.deltas)],
    }
    if config.extra.get("merge"):
        found["merge"] = config.extra["merge"]
    if (folder / names.HEADS).is_file():
        from speft_core.multihead import load_heads

        heads, kinds = load_heads(folder)
        found["heads"] = {
            t: {"kind": kinds[t], "tensors": {n: list(x.shape) for n, x in head.items()}} for t, head in heads.items()
        }
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_against(adapter: SparseAdapter, base: str | Path) -> int:
    """Check the adapter's fingerprints against a base checkpoint, a tensor at a time; returns how many were checked.

    UserError naming the first tensor that differs.
    """
    checkpoint = Checkpoint(base)
    for name, delta in adapter.deltas.items():
        keys = checkpoint.keys_of(name)
        if not keys:
            raise UserError(f"this adapter is for another base: {base} has no tensor for {name}")
        with checkpoint.tensor(keys[0]) as weight:
            check_shape(name, weight, delta.shape, str(base))
            base_K = gather(weight, delta.indices_K)
            check_fingerprint(name, weight, delta, adapter.fingerprint.get(name), str(base), base_K)
    return len(adapter.deltas)
