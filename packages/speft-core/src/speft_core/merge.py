"""Merging sparse adapters of one base into one adapter, a tensor at a time. The methods are rows of `METHODS`.

Shape suffixes: A adapters, U union of their kept entries, K kept entries of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch

from .adapter import AdapterConfig, SparseAdapter
from .delta import VALUE_DTYPES, SparseDelta
from .errors import UserError, nearest
from .fingerprint import same_sample
from .merge_methods import METHODS, Stack
from .merge_report import Row, measure, totals

HEAD = re.compile(
    r"(?:\w+\.)*(?:lm_head|embed_out|score|classifier|pre_classifier|classification_head|qa_outputs|sequence_summary|logits_proj)\..+"
)


class Source(Protocol):
    """An adapter to merge: in memory (SparseAdapter) or read a tensor at a time (merge_files.AdapterFile)."""

    @property
    def deltas(self) -> Mapping[str, SparseDelta]: ...
    @property
    def dense(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def config(self) -> AdapterConfig: ...
    @property
    def fingerprint(self) -> Mapping[str, dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a merge is asked to do, checked."""

    method: str
    weights: tuple[float, ...]
    density: float
    seed: int
    dtype: torch.dtype | None

    def record(self) -> dict[str, Any]:
        """For the provenance: only what the method uses."""
        row = METHODS[self.method]
        given: dict[str, Any] = {"method": self.method}
        if row.weights:
            given["weights"] = list(self.weights)
        if row.density:
            given["density"] = self.density
        if self.method.startswith("dare"):
            given["seed"] = self.seed
        return given


def make_recipe(
    count: int, method: str, weights: Sequence[float] | None, density: float | None, seed: int, dtype: torch.dtype | None
) -> Recipe:
    """Check the options against the method; UserError for an unknown method or an option it has no use for."""
    if count < 1:
        raise UserError("merging needs at least one adapter, got none")
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}.{nearest(method, METHODS)}")
    row = METHODS[method]
    if weights is not None and not row.weights:
        raise UserError(f"method {method!r} takes no weights; use 'weighted'")
    if weights is None and method == "weighted":
        raise UserError("method 'weighted' needs weights, one for each adapter")
    if density is not None and not row.density:
        allowed = ", ".join(name for name, r in METHODS.items() if r.density)
        raise UserError(f"method {method!r} takes no density; those that do: {allowed}")
    numbers = tuple(float(w) for w in weights) if weights is not None else (1.0,) * count
    if len(numbers) != count:
        raise UserError(f"weights must be one for each adapter ({count}), got {len(numbers)}")
    if not all(math.isfinite(w) for w in numbers) or (method == "mean" and sum(numbers) == 0):
        raise UserError(f"weights must be finite (and for 'mean' not add up to 0), got {list(numbers)}")
    share = 1.0 if density is None else float(density)
    if not 0 < share <= 1:
        raise UserError(f"density must lie in (0, 1], a share of each adapter's own entries, got {density}")
    if dtype is not None and dtype not in VALUE_DTYPES:
        raise UserError(f"dtype must be a floating point type, got {dtype}")
    return Recipe(method=method, weights=numbers, density=share, seed=int(seed), dtype=dtype)


def check_same_base(sources: Sequence[Source], names: Sequence[str]) -> None:
    """UserError naming the first tensor, or the base models, in which two adapters are not of one base.

    Shapes of shared tensors and the hashes of a sample of the base (see fingerprint.py) decide; where no tensor is shared,
    the names of the base models must agree.
    """
    holders: dict[str, tuple[Source, str]] = {}  # tensor -> the first source that has a record of its base
    for place, (source, name) in enumerate(zip(sources, names, strict=True)):
        proven = False
        for tensor in source.deltas:
            record = source.fingerprint.get(tensor, {})
            if tensor not in holders:
                if record:
                    holders[tensor] = source, name
                continue
            holder, held_by = holders[tensor]
            before = holder.fingerprint[tensor]
            shapes = [tuple(f["shape"]) for f in (before, record) if "shape" in f]
            if len(shapes) == 2 and shapes[0] != shapes[1]:
                raise UserError(f"{held_by} and {name} have different bases: {tensor} has shapes {shapes[0]} and {shapes[1]}")
            same = same_sample(before, record)
            if same is False:
                raise UserError(f"{held_by} and {name} were trained on different bases: {tensor} has other values")
            proven = proven or (same is True and holder is sources[0])
            if same is None and "sample" in record and "sample" not in before:  # it knows more
                holders[tensor] = source, name
        a, b = sources[0].config.base_model_name_or_path, source.config.base_model_name_or_path
        if place and not proven and a is not None and b is not None and a != b:
            hint = "if they are the same model, pass check_base=False"
            raise UserError(f"{names[0]} and {name} have different bases, {a!r} and {b!r}; {hint}")


def stack_deltas(name: str, deltas: Sequence[SparseDelta | None], weights: Sequence[float]) -> tuple[torch.Tensor, Stack]:
    """indices_U of the union, and the values of all adapters on it (fp32, or fp64 where one has fp64)."""
    present = [d for d in deltas if d is not None]
    shapes = {d.shape for d in present}
    if len(shapes) > 1:
        raise UserError(
            f"{name} has different shapes in the adapters: {', '.join(map(str, sorted(shapes)))}; they have different bases"
        )
    indices_U = torch.unique(torch.cat([d.indices_K.cpu() for d in present]))
    dtype = torch.float64 if any(d.values_K.dtype == torch.float64 for d in present) else torch.float32
    values_AU = torch.zeros(len(deltas), indices_U.numel(), dtype=dtype)
    present_AU = torch.zeros(values_AU.shape, dtype=torch.bool)
    for a, delta in enumerate(deltas):
        if delta is not None:
            at_K = torch.searchsorted(indices_U, delta.indices_K.cpu())
            values_AU[a, at_K] = delta.values_K.cpu().to(dtype)
            present_AU[a, at_K] = True
    return indices_U, Stack(name, values_AU, present_AU, torch.tensor(weights, dtype=dtype))


def merged_deltas(sources: Sequence[Source], recipe: Recipe) -> Iterator[tuple[str, SparseDelta, Row]]:
    """Merge tensor after tensor: (name, merged delta, what was measured). Memory stays that of one tensor of all adapters."""
    tensors = list(dict.fromkeys(name for source in sources for name in source.deltas))
    for name in tensors:
        deltas = [source.deltas.get(name) for source in sources]
        indices_U, stack = stack_deltas(name, deltas, recipe.weights)
        values_U, kept_U = METHODS[recipe.method].function(stack, recipe.density, recipe.seed)
        dtypes = [d.values_K.dtype for d in deltas if d is not None]
        dtype = recipe.dtype or reduce(torch.promote_types, dtypes)
        shape = next(d.shape for d in deltas if d is not None)
        merged = SparseDelta(indices_U[kept_U], values_U[kept_U].to(dtype), shape)
        if not bool(torch.isfinite(merged.values_K).all()):
            raise UserError(f"{name}: the merged values do not fit {dtype}; pass dtype=torch.float32")
        yield name, merged, measure(stack, merged)


def is_head(name: str) -> bool:
    """Whether a dense tensor is one of a head, by the names that Transformers' models give what lies on top of a body."""
    return HEAD.fullmatch(name) is not None


def merged_dense(sources: Sequence[Source]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Dense tensors that one adapter alone has, or all that have it agree on; and the names of those that were left apart.

    A layer is left apart whole: with a weight that differs goes a bias that is the same, such as one of zeros.
    """
    kept: dict[str, torch.Tensor] = {}
    apart: set[str] = set()
    for source in sources:
        for name, tensor in source.dense.items():
            if name in kept and not (kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor)):
                apart.add(name)
            kept.setdefault(name, tensor)
    layers = {layer for name in apart if (layer := name.rpartition(".")[0])}
    apart.update(name for name in kept if name.rpartition(".")[0] in layers)
    return {n: t for n, t in kept.items() if n not in apart}, sorted(apart)


def merged_print(name: str, merged: SparseDelta, sources: Sequence[Source]) -> dict[str, Any]:
    """The fingerprint of a merged tensor: the sources' own where the positions are theirs, otherwise the sample alone."""
    found: dict[str, Any] = {}
    for source in sources:
        record = source.fingerprint.get(name)
        if record is None or name not in source.deltas:
            continue
        if torch.equal(source.deltas[name].indices_K.cpu(), merged.indices_K):
            return dict(record)
        found = found or {k: v for k, v in record.items() if k in ("shape", "sample", "sample_float16")}
    return found


def merged_config(
    sources: Sequence[Source], recipe: Recipe, names: Sequence[str], rows: Sequence[Row], apart: list[str]
) -> AdapterConfig:
    """What the sources agree on, and where the merge comes from."""
    configs = [s.config for s in sources]

    def common(field: str) -> Any:
        values = [getattr(c, field) for c in configs]
        return values[0] if all(v == values[0] for v in values) else None

    figures = totals(rows, len(sources))
    record = recipe.record() | {
        "sources": [{"name": n, "nnz": nnz} for n, nnz in zip(names, figures["nnz"], strict=True)],
        "figures": figures,
    }
    if apart:
        record["heads_left_apart"] = apart
    headless = any(map(is_head, apart))
    if headless:
        record["task_type"] = common("task_type")  #: of the sources
    targets = list(dict.fromkeys(t for c in configs for t in c.targets))
    return AdapterConfig(
        base_model_name_or_path=configs[0].base_model_name_or_path,
        base_model_revision=common("base_model_revision"),
        task_type=None if headless else common("task_type"),  # a body without its head does no task
        metric=common("metric"),
        scope=common("scope"),
        targets=targets,
        library_versions=configs[0].library_versions,
        extra={"merge": record},
    )


def merge(
    adapters: Sequence[SparseAdapter],
    method: str = "sum",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    check_base: bool = True,
) -> SparseAdapter:
    """Merge adapters of one base into one.

    method: a row of METHODS (sum, mean, weighted, ties, dare, dare_ties, magnitude, negate). weights: one for each adapter
    (1 by default). density: the share of each adapter's own entries that ties, dare and magnitude keep (1 by default).
    seed: of DARE's draws, which also depend on the tensor and the adapter but not on the adapters' order. dtype: of the
    merged values; by default the one that holds all the sources' dtypes. names: what the provenance calls the sources.

    Heads (dense tensors) that differ between adapters are left out: compose them with MultiHeadModel. What the merge did
    (overlap, sign conflicts, norms) stands in `config.extra["merge"]["figures"]`, by tensor in `merge_report`.
    UserError for adapters of different bases.
    """
    recipe = make_recipe(len(adapters), method, weights, density, seed, dtype)
    names = source_names(len(adapters), names)
    if check_base:
        check_same_base(adapters, names)
    deltas, prints, rows = {}, {}, []
    for name, merged, row in merged_deltas(adapters, recipe):
        deltas[name] = merged
        prints[name] = merged_print(name, merged, adapters)
        rows.append(row)
    dense, apart = merged_dense(adapters)
    config = merged_config(adapters, recipe, names, rows, apart)
    return SparseAdapter(deltas, dense, config, {n: p for n, p in prints.items() if p}).check()


def source_names(count: int, names: Sequence[str] | None) -> list[str]:
    """What the provenance calls the sources: `names`, one for each, or their numbers."""
    if names is None:
        return [f"adapter {i + 1}" for i in range(count)]
    if len(names) != count:
        raise UserError(f"names must be one for each adapter ({count}), got {len(names)}")
    return list(names)


def merge_report(adapters: Sequence[SparseAdapter]) -> list[Row]:
    """Overlap, sign conflicts and norms of the adapters' plain sum, tensor by tensor."""
    recipe = make_recipe(len(adapters), "sum", None, None, 0, torch.float64)
    return [row for _, _, row in merged_deltas(adapters, recipe)]


def subtract(merged: SparseAdapter, part: SparseAdapter) -> SparseAdapter:
    """Take `part` out of a sum. Where the supports are disjoint the rest is what it was before, bit for bit.

    An entry of `part` that comes out at zero is dropped, and a tensor that has no entry left. Dense tensors are kept.
    """
    deltas: dict[str, SparseDelta] = {}
    for name, delta in merged.deltas.items():
        taken = part.deltas.get(name)
        if taken is None:
            deltas[name] = delta
            continue
        indices_U, stack = stack_deltas(name, [delta, taken], [1.0, 1.0])
        values_U = stack.values_AU[0] - stack.values_AU[1]
        kept_U = ~(stack.present_AU[1] & (values_U == 0))
        if bool(kept_U.any()):
            deltas[name] = SparseDelta(indices_U[kept_U], values_U[kept_U].to(delta.values_K.dtype), delta.shape)
    for name in part.deltas.keys() - merged.deltas.keys():
        deltas[name] = SparseDelta(part.deltas[name].indices_K, -part.deltas[name].values_K, part.deltas[name].shape)
    prints = {n: p for n in deltas if (p := merged_print(n, deltas[n], [merged, part]))}
    extra = {k: v for k, v in merged.config.extra.items() if k != "merge"}
    config = AdapterConfig(**{**vars(merged.config), "extra": extra, "random": None})
    return SparseAdapter(deltas, dict(merged.dense), config, prints).check()
