"""A picture of an adapter: density of the kept entries by layer (down) and by matrix (across), as a small SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from xml.sax.saxutils import escape

from speft_core import SparseDelta

LAYER = re.compile(r"(?:.*\.)?(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)")
ROWS, COLUMNS = 200, 40  # at most this many are drawn
CELL_W, CELL_H, LEFT, TOP = 46, 14, 60, 110


def by_layer(deltas: Mapping[str, SparseDelta]) -> dict[str, dict[str, float]]:
    """Row (layer number, or "-" outside the layers) -> column (matrix) -> density, in the order of the tensors."""
    table: dict[str, dict[str, float]] = {}
    for name, delta in deltas.items():
        found = LAYER.fullmatch(name)
        row, column = (found[1], found[2].removesuffix(".weight")) if found else ("-", name.removesuffix(".weight"))
        table.setdefault(row, {})[column] = delta.nnz / max(1, delta.numel)
    return dict(sorted(table.items(), key=lambda item: (item[0] == "-", int(item[0]) if item[0] != "-" else 0)))


def _colour(share: float) -> str:
    """White to dark blue; `share` in [0, 1]."""
    low, high = (247, 251, 255), (8, 48, 107)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def density_svg(deltas: Mapping[str, SparseDelta]) -> str:
    """The picture; colour goes with the square root of the density, from zero to the largest one."""
    table = by_layer(deltas)
    rows = list(table)[:ROWS]
    columns = list(dict.fromkeys(c for row in rows for c in table[row]))[:COLUMNS]
    top = max((d for row in table.values() for d in row.values()), default=0.0)
    width, height = LEFT + CELL_W * len(columns) + 20, TOP + CELL_H * len(rows) + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="14">Density by layer and matrix; darkest = {100 * top:.3g} %</text>',
    ]
    for i, column in enumerate(columns):
        x = LEFT + CELL_W * i + CELL_W // 2
        short = escape(column if len(column) <= 18 else "…" + column[-17:])
        out.append(f'<text transform="translate({x},{TOP - 6}) rotate(-40)">{short}</text>')
    for j, row in enumerate(rows):
        y = TOP + CELL_H * j
        out.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(row)}</text>')
        for i, column in enumerate(columns):
            density = table[row].get(column)
            if density is None:
                continue
            share = math.sqrt(density / top) if top else 0.0
            place = f'x="{LEFT + CELL_W * i}" y="{y}" width="{CELL_W - 1}" height="{CELL_H - 1}"'
            title = escape(f"{row} {column}: {100 * density:.4g} %")
            out.append(f'<rect {place} fill="{_colour(share)}"><title>{title}</title></rect>')
    return "\n".join([*out, "</svg>"]) + "\n"


def density_table(deltas: Mapping[str, SparseDelta]) -> list[tuple[str, int, int, int]]:
    """Rows (matrix, layers that have it, kept, of how many), summed over the layers."""
    sums: dict[str, list[int]] = {}
    for name, delta in deltas.items():
        found = LAYER.fullmatch(name)
        entry = sums.setdefault(found[2] if found else name, [0, 0, 0])
        for i, more in enumerate((1, delta.nnz, delta.numel)):
            entry[i] += more
    return [(name, *entry) for name, entry in sums.items()]  # type: ignore[misc]
