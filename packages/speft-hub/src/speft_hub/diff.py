"""What lies between two checkpoints or two adapters, a matrix at a time; and the first as an adapter.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.fingerprint import fingerprint
from speft_core.gaps import index_dtype
from speft_core.merge_files import AdapterFile
from speft_core.writing import add_values

from .added import added_heads, task_type
from .checkpoint import LM_HEAD, Checkpoint

RANK_LIMIT = 8192  # the longer side of a matrix whose rank we are ready to compute


@dataclass(frozen=True)
class Row:
    """One tensor. changed: entries that differ. For adapters also how many each keeps and how many both keep.

    only: "a" or "b", the checkpoint that alone has the tensor; all its entries count as changed, and the figures are its own.
    """

    name: str
    shape: tuple[int, ...]
    changed: int
    density: float
    norm: float
    largest: float
    rank: int | None = None
    kept: tuple[int, int] | None = None
    overlap: int | None = None
    only: str | None = None

    def record(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def _row(name: str, shape: tuple[int, ...], difference: torch.Tensor, rank: bool, **more: Any) -> Row:
    """Figures of a dense or flat difference in fp32 or fp64."""
    changed, numel = int(torch.count_nonzero(difference)), max(1, math.prod(shape))
    found = None
    if rank and len(shape) == 2 and max(shape) <= RANK_LIMIT:
        matrix = difference.view(shape)
        rows, columns = matrix.any(dim=1), matrix.any(dim=0)  # empty rows and columns add nothing to a rank
        found = int(torch.linalg.matrix_rank(matrix[rows][:, columns])) if changed else 0
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return Row(name, shape, changed, changed / numel, float(difference.double().norm()), largest, found, **more)


def diff_checkpoints(a: str | Path, b: str | Path, rank: bool = False) -> Iterator[Row]:
    """b - a, tensor after tensor, then what only b has; UserError when they are not of one architecture."""
    first, second = Checkpoint(a), Checkpoint(b)
    if not first.places.keys() & second.places.keys():
        raise UserError(f"{next(iter(first.places))} is in {a} and not in {b}, as are all others; they are not of one architecture")
    for key, place in first.places.items():
        if key in second.places and second.places[key].shape != place.shape:
            raise UserError(f"{key} has shape {place.shape} in {a} and {second.places[key].shape} in {b}")
        if not place.dtype.is_floating_point:
            continue
        if key not in second.places:
            yield _alone(first, key, "a", rank)
            continue
        with first.tensor(key) as x, second.tensor(key) as y:
            yield _row(key, place.shape, y.float() - x.float(), rank)
    for key, place in second.places.items():
        if key not in first.places and place.dtype.is_floating_point:
            yield _alone(second, key, "b", rank)


def _alone(checkpoint: Checkpoint, key: str, side: str, rank: bool) -> Row:
    with checkpoint.tensor(key) as tensor:
        row = _row(key, tuple(tensor.shape), tensor.float(), rank, only=side)
    return replace(row, changed=tensor.numel(), density=1.0)


def diff_adapters(a: str | Path, b: str | Path, rank: bool = False) -> Iterator[Row]:
    """The change that b makes minus the change that a makes, with the overlap of what they keep."""
    with ExitStack() as stack:
        first, second = AdapterFile(a, stack), AdapterFile(b, stack)
        for name in dict.fromkeys([*first.deltas, *second.deltas]):
            x, y = first.deltas.get(name), second.deltas.get(name)
            shape = (x or y).shape  # type: ignore[union-attr]
            if x is not None and y is not None and x.shape != y.shape:
                raise UserError(f"{name} has shape {x.shape} in {a} and {y.shape} in {b}; they have different bases")
            dense = torch.zeros(math.prod(shape))
            for delta, sign in ((x, -1.0), (y, 1.0)):
                if delta is not None:
                    dense[delta.indices_K.long()] += sign * delta.values_K.float()
            overlap = int(torch.isin(x.indices_K, y.indices_K).sum()) if x is not None and y is not None else 0
            kept = (0 if x is None else x.nnz, 0 if y is None else y.nnz)
            yield _row(name, shape, dense, rank, kept=kept, overlap=overlap)


def _exact(base: torch.Tensor, target: torch.Tensor) -> SparseDelta:
    """The change that takes `base` to `target` bit for bit, in the narrowest dtype that does: the base's, fp32 or fp64."""
    flat, wanted = base.reshape(-1), target.reshape(-1)
    indices_K = torch.nonzero(flat != wanted).flatten()
    base_K, wanted_K = flat[indices_K], wanted[indices_K].to(base.dtype)
    for dtype in dict.fromkeys((base.dtype, torch.float32, torch.float64)):
        values_K = (wanted_K.double() - base_K.double()).to(dtype)
        if bool(torch.isfinite(values_K).all()) and torch.equal(add_values(base_K, values_K), wanted_K):
            break
    return SparseDelta(indices_K.to(index_dtype(flat.numel())), values_K, tuple(base.shape))


def adapter_between(a: str | Path, b: str | Path, top_k: int | None = None, base_model: str | None = None) -> SparseAdapter:
    """The adapter that takes checkpoint `a` to checkpoint `b`: exactly, or only the `top_k` largest changes of all.

    A classifier's head that `a` has not comes along whole, whatever `top_k` is; other tensors that `b` alone has are refused.
    Tensors are read one after the other; what is kept in memory is the adapter.
    """
    first, second = Checkpoint(a), Checkpoint(b)
    missing = [k for k in first.places if k not in second.places]
    if missing:
        raise UserError(f"{missing[0]} is in {a} and not in {b}; they are not of one architecture")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {top_k}")
    dense = added_heads(first, second)
    deltas: dict[str, SparseDelta] = {}
    smallest = torch.empty(0)  # the top_k largest magnitudes so far
    for key, place in first.places.items():
        if second.places[key].shape != place.shape:
            raise UserError(f"{key} has shape {place.shape} in {a} and {second.places[key].shape} in {b}")
        if not place.dtype.is_floating_point:
            continue
        if key.endswith(LM_HEAD) and len(first.keys_of(key)) > 1:  # one parameter stored twice, and changed once
            if not second.is_tied_copy(key):
                raise UserError(f"{key} is not the embeddings in {b}: {a} ties it to them, and an adapter cannot untie them")
            continue
        with first.tensor(key) as x, second.tensor(key) as y:
            delta = _exact(x, y)
        if not delta.nnz:
            continue
        if not bool(torch.isfinite(delta.values_K).all()):
            raise UserError(f"{key} holds NaN or infinity in {b}")
        if top_k is not None:
            both = torch.cat([smallest, delta.values_K.abs().float()])
            smallest = both.topk(min(top_k, both.numel())).values
            delta = _at_least(delta, smallest, top_k)
        deltas[key] = delta
        if top_k is not None and sum(d.nnz for d in deltas.values()) > 2 * top_k:
            deltas = {name: _at_least(d, smallest, top_k) for name, d in deltas.items()}
    if top_k is not None and sum(d.nnz for d in deltas.values()) > top_k:
        deltas = _largest(deltas, float(smallest[-1]), top_k)
    prints = {}
    for key, delta in deltas.items():
        with first.tensor(key) as x:
            prints[key] = fingerprint(x, delta.indices_K)
    extra = {"difference_of": [Path(a).name, Path(b).name]}
    budget = {} if top_k is None else {"k": top_k}
    config = AdapterConfig(
        base_model_name_or_path=base_model or str(Path(a).resolve()),
        task_type=task_type(second) if dense else None,
        metric="difference",
        budget=budget,
        extra=extra,
    )
    return SparseAdapter(deltas, dense, config, prints)


def _at_least(delta: SparseDelta, smallest: torch.Tensor, top_k: int) -> SparseDelta:
    """The entries that are among the `top_k` largest seen so far; `smallest` holds those magnitudes in falling order."""
    if smallest.numel() < top_k:
        return delta
    keep_K = delta.values_K.abs().float() >= smallest[-1]
    return SparseDelta(delta.indices_K[keep_K].clone(), delta.values_K[keep_K].clone(), delta.shape)


def _largest(deltas: dict[str, SparseDelta], threshold: float, top_k: int) -> dict[str, SparseDelta]:
    """Exactly `top_k` entries: all above the threshold, then ties in the order of tensors and indices."""
    above = sum(int((d.values_K.abs().float() > threshold).sum()) for d in deltas.values())
    ties_left, kept = top_k - above, {}
    for name, d in deltas.items():
        size_K = d.values_K.abs().float()
        keep_K = size_K > threshold
        ties_K = torch.nonzero(size_K == threshold).flatten()[:ties_left]
        ties_left -= len(ties_K)
        keep_K[ties_K] = True
        if bool(keep_K.any()):
            kept[name] = SparseDelta(d.indices_K[keep_K], d.values_K[keep_K], d.shape)
    return kept
