"""The entries by dense products, picked from the blocks that these give: the plans compact and dense.

Shape suffixes: O outputs, T tokens, K kept entries, R rows and C columns of the product, B rows of a tile.
"""

from __future__ import annotations

import torch

from .cut import Cut, kind_of
from .inputs import Inputs
from .layout import Layout

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # elements of a product held at a time: 4 MB of fp32, or 64 MB of bf16
TILE_ROWS = {"cpu": 1, "cuda": 128}  # the rows of a tile are a multiple of it
WHOLE_ABOVE = {"cpu": 1.0, "cuda": 0.8}  # share of rows or columns from which on a gather costs more than it saves


def compact_entries(inputs: Inputs, grad_y: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One dense product over touched rows and columns, a tile of rows at a time; the entries are picked from each tile."""
    if layout.nnz == 0:
        return _nothing(grad_y)
    grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
    rows = layout.derived("rows", lambda: Cut.of(layout.rows_R, layout.shape[0], WHOLE_ABOVE[kind_of(grad_TO)]))
    return _entries(inputs, grad_TO, layout, rows, "compact")


def dense_entries(inputs: Inputs, grad_y: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The product of all rows with the kept columns, a tile of rows at a time, picked at the entries; bounded memory."""
    if layout.nnz == 0:
        return _nothing(grad_y)
    return _entries(inputs, grad_y.reshape(-1, grad_y.shape[-1]), layout, Cut(None, layout.shape[0], layout.rows_R), "dense")


def _entries(inputs: Inputs, grad_TO: torch.Tensor, layout: Layout, rows: Cut, name: str) -> torch.Tensor:
    width = inputs.factors[0][0].shape[1]
    columns = layout.derived(("columns", inputs.key, width), lambda: Cut.of(inputs.places(layout), width, WHOLE_ABOVE[kind_of(grad_TO)]))
    grad_TR = grad_TO if rows.picks_P is None else grad_TO.index_select(1, rows.picks_P)
    x_TC = inputs.gather(columns.picks_P).to(grad_TO.dtype)
    out_K = torch.empty(layout.nnz, dtype=torch.promote_types(grad_TO.dtype, torch.float32), device=grad_TO.device)
    step = _step(rows.size, columns.size, kind_of(grad_TO))
    for start, first, last, place_K in layout.derived((name, inputs.key, width, step), lambda: _tiles(layout, rows, columns, step)):
        product_BC = grad_TR[:, start : start + step].T @ x_TC
        out_K[first:last] = product_BC.view(-1).index_select(0, place_K)
    return out_K


def _tiles(layout: Layout, rows: Cut, columns: Cut, step: int) -> list[tuple[int, int, int, torch.Tensor]]:
    """Tiles of rows that hold an entry: the first row, the entries in it (first, last), and their places in its product."""
    row_K, col_K = rows.places_N[layout.row_of_K], columns.places_N[layout.col_of_K]
    held_R = layout.host_R if rows.picks_P is None else torch.arange(layout.host_R.numel())  # each touched row's place, on the CPU
    starts = torch.searchsorted(held_R, torch.arange(0, rows.size + step, step, dtype=held_R.dtype))
    bounds = layout.first_R[starts].tolist()
    tiles = []
    for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first < last:
            start = number * step
            tiles.append((start, first, last, (row_K[first:last] - start) * columns.size + col_K[first:last]))
    return tiles


def _step(rows: int, columns: int, kind: str) -> int:
    """Rows of a tile: few enough for a CPU's caches; on a GPU, where each tile costs a launch, many, and alike in all tiles."""
    most, even = max(1, TILE_ELEMENTS[kind] // max(1, columns)), TILE_ROWS[kind]
    if rows <= most or even == 1:
        return most
    alike = -(-rows // -(-rows // most))
    return -(-alike // even) * even


def _nothing(grad_y: torch.Tensor) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.promote_types(grad_y.dtype, torch.float32), device=grad_y.device)
