"""The backward plans: ways to get k entries of grad_yᵀ x without the dense product. A table; `auto` picks a row.

A plan's function runs in backward and returns the gradient of the K kept entries, in fp32 (float64 for float64 inputs).
Each equals reference.weight_gradient_entries.

Shape suffixes: O outputs, I inputs, T tokens, K kept entries, R rows with an entry, C columns with an entry, B rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UserError
from . import native
from .inputs import Inputs
from .layout import Layout
from .sampled import sampled_entries

TILE_ELEMENTS = 1 << 20  # elements of a product held at a time: 4 MB of fp32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tile_rows(columns: int) -> int:
    return max(1, TILE_ELEMENTS // max(1, columns))


def compact_entries(inputs: Inputs, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One dense product over touched rows and columns, a tile of rows at a time; the entries are picked from each tile."""
    grad_TR = grad_TO if layout.rows_R.numel() == layout.shape[0] else grad_TO.index_select(1, layout.rows_R)
    x_TC = inputs.gather(layout)
    out_K = torch.empty(layout.nnz, dtype=_wide(grad_TO.dtype), device=grad_TO.device)
    for start, stop, first, last, place_K in _tiles(layout):
        product_BC = grad_TR[:, start:stop].T @ x_TC.to(grad_TR.dtype)
        out_K[first:last] = product_BC.view(-1).index_select(0, place_K)
    return out_K


def _tiles(layout: Layout) -> list[tuple[int, int, int, int, torch.Tensor]]:
    """Tiles of touched rows (start, stop), the entries in each (first, last), and their places in its product. Made once."""

    def make() -> list[tuple[int, int, int, int, torch.Tensor]]:
        tiles, columns = [], layout.cols_C.numel()
        step = _tile_rows(columns)
        for start in range(0, layout.rows_R.numel(), step):
            stop = min(start + step, layout.rows_R.numel())
            first, last = int(layout.first_R[start]), int(layout.first_R[stop])
            place_K = (layout.row_of_K[first:last] - start) * columns + layout.col_of_K[first:last]
            tiles.append((start, stop, first, last, place_K))
        return tiles

    return layout.derived(("tiles", TILE_ELEMENTS), make)


def dense_entries(inputs: Inputs, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The product of all rows with the kept columns, a tile of rows at a time, gathered at the entries; bounded memory."""
    x_TC = inputs.gather(layout).to(grad_TO.dtype)
    out_K = torch.empty(layout.nnz, dtype=_wide(grad_TO.dtype), device=grad_TO.device)
    step = _tile_rows(x_TC.shape[1])

    def make() -> list[tuple[int, int, int, torch.Tensor]]:
        tiles, columns, rows_R = [], layout.cols_C.numel(), layout.rows_R.cpu()
        bounds = torch.searchsorted(rows_R, torch.arange(0, layout.shape[0] + step, step, dtype=rows_R.dtype))
        for tile, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            first, last = int(layout.first_R[low]), int(layout.first_R[high])
            if first < last:
                row_K = layout.rows_R[layout.row_of_K[first:last]] - tile * step
                tiles.append((tile * step, first, last, row_K * columns + layout.col_of_K[first:last]))
        return tiles

    for start, first, last, place_K in layout.derived(("rows", step), make):
        product_BC = grad_TO[:, start : start + step].T @ x_TC
        out_K[first:last] = product_BC.reshape(-1).index_select(0, place_K)
    return out_K


@dataclass(frozen=True)
class Plan:
    """A row of the table: the plan's name, its function, and in a few words how."""

    name: str
    entries: Callable[[Inputs, torch.Tensor, Layout], torch.Tensor]
    how: str


PLANS = {
    plan.name: plan
    for plan in (
        Plan("compact", compact_entries, "dense product of touched rows and columns"),
        Plan("sampled", sampled_entries, "one dot product per kept entry, by PyTorch or Triton"),
        Plan("native", native.native_entries, "one dot product per kept entry, compiled for this CPU"),
        Plan("dense", dense_entries, "tiled product of all rows, gathered"),
    )
}


def plan_named(backward: str, layout: Layout, weight: torch.Tensor) -> tuple[Plan, str]:
    """The plan for `backward` ("auto" or a name of the table) and the reason; UserError for another name or one that cannot run."""
    from .cost import choose

    if backward == "auto":
        name, reason = choose(layout, weight)
        return PLANS[name], reason
    if backward not in PLANS:
        raise UserError(f"backward must be auto or one of {', '.join(PLANS)}, got {backward!r}")
    if backward == "native" and not native.fits(weight):
        why = native.reason() or f"it takes fp32 and bf16 weights on a CPU, not {weight.dtype} on {weight.device.type}"
        raise UserError(f"backward native cannot run here: {why}; use auto")
    return PLANS[backward], "asked for"
