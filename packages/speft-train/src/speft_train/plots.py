"""The plots of report.md: the loss curve, and the density of the mask by layer and module."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speft_core.files import atomic_write

LOSS, DENSITY, OVERLAP = "loss.png", "density.png", "overlap.png"
OUTSIDE = "-"


def loss_curve(path: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Training (and validation) loss over steps; False when there is nothing to draw."""
    lines = {
        name: [(row["step"], row[key]) for row in history if key in row and "step" in row]
        for key, name in (("loss", "training"), ("eval_loss", "validation"))
    }
    if not any(lines.values()):
        return False
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    for name, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(path, figure)
    return True


def score_bars(path: Path, means: Mapping[str, Mapping[str, float]], spreads: Mapping[str, Mapping[str, float]]) -> None:
    """Scores of a sweep: a panel a column, a bar a row, the spread over seeds as a whisker."""
    figure = _figure(2.2 + 2.0 * len(means), 1.2 + 0.26 * max(map(len, means.values())))
    for number, (column, scores) in enumerate(means.items()):
        axes = figure.add_subplot(1, len(means), number + 1)
        rows = list(scores)
        axes.barh(rows, [scores[r] for r in rows], xerr=[spreads[column][r] for r in rows], color="0.6", height=0.7)
        axes.set_title(column, fontsize=9)
        axes.invert_yaxis()
        low = min(scores.values())
        axes.set_xlim(left=low - 0.25 * max(max(scores.values()) - low, 1e-3))
        axes.tick_params(labelsize=7, labelleft=number == 0)
    _write(path, figure)


def score_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], label: str) -> None:
    """A panel a column, a line a metric or method through (x, score, spread), x on a logarithmic scale."""
    figure = _figure(1.8 + 3.2 * len(curves), 3.8)
    for number, (column, lines) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), number + 1)
        for name, points in lines.items():
            axes.errorbar(*zip(*points, strict=True), label=name, marker="o", markersize=3, capsize=2, linewidth=1)
        axes.set_xscale("log")
        axes.set_title(column, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.containers}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
    _write(path, figure)


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a parameter: the first number in its name, and what follows it."""
    found = re.search(r"\.(\d+)\.(.+)$", "." + name)
    layer, rest = (found[1], found[2]) if found else (OUTSIDE, name)
    module = rest.removesuffix(".weight")
    return layer, module


def density_table(densities: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """(layers, modules, density[layer][module]); NaN where a layer has no such module."""
    cells = {place(name): density for name, density in densities.items()}
    layers = sorted({layer for layer, _ in cells}, key=lambda text: (text == OUTSIDE, int(text) if text.isdigit() else 0))
    modules = list(dict.fromkeys(module for _, module in cells))
    return layers, modules, [[cells.get((layer, module), float("nan")) for module in modules] for layer in layers]


def density_map(path: Path, densities: Mapping[str, float]) -> bool:
    """Heat map of layers x modules; False when the mask is empty."""
    layers, modules, table = density_table(densities)
    if not layers:
        return False
    figure = _figure(2.0 + 0.6 * len(modules), 1.6 + 0.18 * len(layers))
    axes = figure.add_subplot()
    image = axes.imshow([[100 * cell for cell in row] for row in table], aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(modules)), modules, rotation=40, ha="right", fontsize=7)
    step = max(1, len(layers) // 30)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="trained scalars, % of the tensor")
    _write(path, figure)
    return True


def overlap_matrix(path: Path, names: Sequence[str], shared: Sequence[Sequence[float]]) -> None:
    """Share of each row's entries that each column has too, as a picture with the figures in it."""
    size = 2.4 + 0.55 * len(names)
    figure = _figure(size + 0.8, size)
    axes = figure.add_subplot()
    image = axes.imshow(shared, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, line in enumerate(shared):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color="k" if share > 0.6 else "w")
    figure.colorbar(image, label="share of the row's entries")
    _write(path, figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state
    return figure


def _write(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
