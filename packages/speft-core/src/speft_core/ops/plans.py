"""The backward plans: three ways to get k entries of grad_yᵀ x without the dense product. A table; `auto` picks a row.

A plan is two functions. `keep` runs in forward and returns the part of the input that backward needs; `entries` runs in
backward and returns the gradient of the K kept entries, in fp32 (float64 for float64 inputs). Each equals
reference.weight_gradient_entries.

Shape suffixes: O outputs, I inputs, T tokens, K kept entries, R rows with an entry, C columns with an entry, B rows of a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UserError
from .layout import Layout

TILE_ELEMENTS = 1 << 20  # elements of a product held at a time: 4 MB of fp32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tile_rows(columns: int) -> int:
    return max(1, TILE_ELEMENTS // max(1, columns))


def keep_all(x_TI: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The whole input."""
    return x_TI


def keep_columns(x_TI: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x[:, C], the only inputs that an entry's gradient reads."""
    if layout.cols_C.numel() == layout.shape[1]:
        return x_TI
    return x_TI.index_select(1, layout.cols_C)


def compact_entries(x_TC: torch.Tensor, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One dense product over touched rows and columns, a tile of rows at a time; the entries are picked from each tile."""
    grad_TR = grad_TO if layout.rows_R.numel() == layout.shape[0] else grad_TO.index_select(1, layout.rows_R)
    out_K = torch.empty(layout.nnz, dtype=_wide(grad_TO.dtype), device=grad_TO.device)
    columns = x_TC.shape[1]
    step = _tile_rows(columns)
    for start in range(0, layout.rows_R.numel(), step):
        stop = min(start + step, layout.rows_R.numel())
        first, last = int(layout.first_R[start]), int(layout.first_R[stop])
        product_BC = grad_TR[:, start:stop].T @ x_TC
        place_K = (layout.row_of_K[first:last] - start) * columns + layout.col_of_K[first:last]
        out_K[first:last] = product_BC.view(-1).index_select(0, place_K)
    return out_K


def dense_entries(x_TI: torch.Tensor, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The full product, a tile of rows at a time, gathered at the entries; bounded memory."""
    out_K = torch.empty(layout.nnz, dtype=_wide(grad_TO.dtype), device=grad_TO.device)
    columns = x_TI.shape[1]
    bounds = torch.searchsorted(
        layout.rows_R.cpu(), torch.arange(0, layout.shape[0] + _tile_rows(columns), _tile_rows(columns))
    )
    for tile, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        first, last = int(layout.first_R[low]), int(layout.first_R[high])
        if first == last:
            continue
        start = tile * _tile_rows(columns)
        product_BI = grad_TO[:, start : start + _tile_rows(columns)].T @ x_TI
        row_K = layout.rows_R[layout.row_of_K[first:last]] - start
        place_K = row_K * columns + layout.cols_C[layout.col_of_K[first:last]]
        out_K[first:last] = product_BI.reshape(-1).index_select(0, place_K)
    return out_K


def sampled_entries(x_TC: torch.Tensor, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sampled dense-dense product (SDDMM) over touched rows and columns: T multiplications an entry, no dense product."""
    wide = _wide(grad_TO.dtype)
    shape = (layout.rows_R.numel(), layout.cols_C.numel())
    first_R = layout.first_R.to(grad_TO.device)
    zeros_K = torch.zeros(layout.nnz, dtype=wide, device=grad_TO.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(first_R, layout.col_of_K, zeros_K, size=shape, check_invariants=False)
    grad_RT = grad_TO.index_select(1, layout.rows_R).to(wide).T.contiguous()
    return torch.sparse.sampled_addmm(pattern, grad_RT, x_TC.to(wide), beta=0.0).values()


@dataclass(frozen=True)
class Plan:
    """A row of the table: what forward keeps, how backward uses it, and in a few words how."""

    name: str
    keep: Callable[[torch.Tensor, Layout], torch.Tensor]
    entries: Callable[[torch.Tensor, torch.Tensor, Layout], torch.Tensor]
    how: str


PLANS = {
    plan.name: plan
    for plan in (
        Plan("compact", keep_columns, compact_entries, "dense product of touched rows and columns"),
        Plan("sampled", keep_columns, sampled_entries, "one dot product per kept entry"),
        Plan("dense", keep_all, dense_entries, "tiled full product, gathered"),
    )
}


def choose(layout: Layout) -> tuple[Plan, str]:
    """The plan that the cost model prefers for `layout`, and why."""
    area, density = layout.touched_area, layout.nnz / max(1, layout.shape[0] * layout.shape[1])
    if area <= 0.5:
        return PLANS["compact"], f"touched rows x columns are {area:.1%} of the area"
    if density <= SAMPLED_BELOW:
        return PLANS["sampled"], f"touched area {area:.1%}, density {density:.2%} is below {SAMPLED_BELOW:.0%}"
    return PLANS["dense"], f"touched area {area:.1%}, density {density:.2%}"


# One SDDMM multiplication costs about ten to twenty of a dense product's on a CPU, so it wins well below 5 % of the area.
SAMPLED_BELOW = 0.03


def plan_named(backward: str, layout: Layout) -> tuple[Plan, str]:
    """The plan for `backward` ("auto" or a name of the table) and the reason; UserError for another name."""
    if backward == "auto":
        return choose(layout)
    if backward not in PLANS:
        raise UserError(f"backward must be auto or one of {', '.join(PLANS)}, got {backward!r}")
    return PLANS[backward], "asked for"
