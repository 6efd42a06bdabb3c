"""What a merge found: how far adapters overlap, where they pull in opposite directions, and how large each is.

Shape suffixes: A adapters, U union of their kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .delta import SparseDelta
from .merge_methods import Stack


@dataclass(frozen=True)
class Row:
    """One tensor: entries of each adapter, of the union, of the result; entries several adapters have; those among them with
    opposite signs; Euclidean norms of each adapter's change and of the merged one."""

    name: str
    nnz: list[int]
    union: int
    merged: int
    overlap: int
    sign_conflicts: int
    norms: list[float]
    merged_norm: float


def measure(stack: Stack, merged: SparseDelta) -> Row:
    """Measure one tensor."""
    signs_AU = stack.values_AU.sign()
    opposed_U = (signs_AU > 0).any(dim=0) & (signs_AU < 0).any(dim=0)
    return Row(
        name=stack.name,
        nnz=stack.present_AU.sum(dim=1).tolist(),
        union=stack.present_AU.shape[1],
        merged=merged.nnz,
        overlap=int((stack.present_AU.sum(dim=0) > 1).sum()),
        sign_conflicts=int(opposed_U.sum()),
        norms=[float(v) for v in stack.values_AU.double().norm(dim=1)],
        merged_norm=float(merged.values_K.double().norm()),
    )


def totals(rows: Sequence[Row], count: int) -> dict[str, Any]:
    """The figures of a whole merge of `count` adapters; zeros for one of heads alone, which has no rows."""
    return {
        "nnz": [sum(r.nnz[a] for r in rows) for a in range(count)],
        "union": sum(r.union for r in rows),
        "merged": sum(r.merged for r in rows),
        "overlap": sum(r.overlap for r in rows),
        "sign_conflicts": sum(r.sign_conflicts for r in rows),
        "norms": [math.sqrt(sum(r.norms[a] ** 2 for r in rows)) for a in range(count)],
        "merged_norm": math.sqrt(sum(r.merged_norm**2 for r in rows)),
    }
