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
from speft_core.delta import VALUE_DTYPES
from speft_core.fingerprint import fingerprint
from speft_core.gaps import index_dtype
from speft_core.merge_files import AdapterFile
from speft_core.writing import add_values

from .added import added_heads, check_missing, is_classifier, shared, task_type
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


def _exact(name: str, base: torch.Tensor, target: torch.Tensor, where: Path) -> tuple[SparseDelta, int]:
    """The change that takes `base` to `target` bit for bit, in the narrowest dtype that does: the base's, fp32 or fp64.

    What the base's dtype cannot hold is rounded to it, as an adapted entry is; returned with how many entries that were. `name`
    and `where` (the target's folder) are for messages.
    """
    flat, wanted = base.reshape(-1), target.reshape(-1)
    rounded = wanted.to(base.dtype)
    if not bool(torch.isfinite(rounded).all()):
        of = f"what {base.dtype}, the base's dtype, cannot" if bool(torch.isfinite(wanted).all()) else "NaN or infinity"
        raise UserError(f"{name} holds {of} in {where}")
    indices_K = torch.nonzero(flat != rounded).flatten()
    base_K, rounded_K = flat[indices_K], rounded[indices_K]
    for dtype in dict.fromkeys((base.dtype, torch.float32, torch.float64)):
        values_K = (rounded_K.double() - base_K.double()).to(dtype)
        reached_K = add_values(base_K, values_K)
        if bool(torch.isfinite(values_K).all()) and torch.equal(reached_K, rounded_K):
            break
    else:
        first = int(torch.nonzero(reached_K != rounded_K)[0])
        far = f"{float(base_K[first]):g} to {float(rounded_K[first]):g}"
        raise UserError(f"{name}: no 64-bit number added takes {far} exactly, so no adapter does")
    delta = SparseDelta(indices_K.to(index_dtype(flat.numel())), values_K, tuple(base.shape))
    return delta, int(torch.count_nonzero(wanted != rounded))


def adapter_between(a: str | Path, b: str | Path, top_k: int | None = None, base_model: str | None = None) -> SparseAdapter:
    """The adapter that takes checkpoint `a` to checkpoint `b`: exactly, or only the `top_k` largest changes of all.

    Where `b` is of a wider dtype than `a`, to what `b` is when rounded to it; `config.extra["rounded"]` has the number of entries
    that were. A classifier's head that `a` has not comes along whole, whatever `top_k` is; what only one of the two has
    otherwise is refused, but for the base's own output layers. Names are those of `b`. Tensors are read one after the other; what is
    kept in memory is the adapter.
    """
    first, second = Checkpoint(a), Checkpoint(b)
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {top_k}")
    both = shared(first, second)
    dense = added_heads(first, second, both)
    check_missing(first, second, both, is_classifier(dense))
    deltas: dict[str, SparseDelta] = {}
    smallest = torch.empty(0)  # the top_k largest magnitudes so far
    rounded = 0
    for name, key in both.items():
        if not _to_compare(first, key, second, name):
            continue
        with first.tensor(key) as x, second.tensor(name) as y:
            delta, count = _exact(name, x, y, second.folder)
        rounded += count
        if not delta.nnz:
            continue
        if top_k is not None:
            sizes = torch.cat([smallest, delta.values_K.abs().float()])
            smallest = sizes.topk(min(top_k, sizes.numel())).values
            delta = _at_least(delta, smallest, top_k)
        deltas[name] = delta
        if top_k is not None and sum(d.nnz for d in deltas.values()) > 2 * top_k:
            deltas = {name: _at_least(d, smallest, top_k) for name, d in deltas.items()}
    if top_k is not None and sum(d.nnz for d in deltas.values()) > top_k:
        deltas = _largest(deltas, float(smallest[-1]), top_k)
    prints = {}
    for name, delta in deltas.items():
        with first.tensor(both[name]) as x:
            prints[name] = fingerprint(x, delta.indices_K)
    config = AdapterConfig(
        base_model_name_or_path=base_model or str(Path(a).resolve()),
        task_type=task_type(second) if is_classifier(dense) else None,
        metric="difference",
        budget={} if top_k is None else {"k": top_k},
        extra={"difference_of": [Path(a).name, Path(b).name]} | ({"rounded": rounded} if rounded else {}),
    )
    return SparseAdapter(deltas, dense, config, prints)


def _to_compare(first: Checkpoint, key: str, second: Checkpoint, name: str) -> bool:
    """Whether a tensor that both have, `key` in one and `name` in the other, may have a change of its own; UserError where it cannot."""
    one, other = first.places[key], second.places[name]
    if one.shape != other.shape:
        raise UserError(f"{name} has shape {one.shape} in {first.folder} and {other.shape} in {second.folder}")
    if not {one.dtype, other.dtype} <= set(VALUE_DTYPES):  # buffers of integers, quantised weights
        with first.tensor(key) as x, second.tensor(name) as y:
            if not torch.equal(x.double(), y.double()):
                kinds = f"of {one.dtype} in {first.folder} and of {other.dtype} in {second.folder}"
                raise UserError(f"{name}, {kinds}, differs; an adapter changes floating point of 16 to 64 bits alone")
        return False
    if key.endswith(LM_HEAD) and len(first.keys_of(key)) > 1:  # one parameter stored twice, and changed once
        if not second.is_tied_copy(name):
            raise UserError(
                f"{name} is not the embeddings in {second.folder}: {first.folder} ties it to them, and an adapter cannot untie them"
            )
        return False
    return True


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
