"""The curves of a sweep: score against density, and against learning rate, a line for each metric or method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import plots
from .sweep_config import Cell, Sweep
from .sweep_table import heading, scaled, score_name

Found = Sequence[tuple[Cell, Mapping[str, Any]]]
Point = tuple[float, float, float]  # x, mean over seeds, sd
Curves = dict[str, dict[str, list[Point]]]  # heading of a column -> line -> points
DENSITY, RATE = "density_curves.png", "learning_rate_curves.png"
RATE_KEY = "train.learning_rate"


def write(sweep: Sweep, final: Found, everything: Found) -> list[str]:
    """Draw what varies: names of the files. `final` are the cells of the table, `everything` has the tuned-away ones too."""
    drawn = []
    by_density = density_curves(sweep, final)
    if by_density:
        plots.score_curves(sweep.folder / DENSITY, by_density, "trained scalars, % of the model")
        drawn.append(DENSITY)
    by_rate = rate_curves(sweep, everything)
    if by_rate:
        plots.score_curves(sweep.folder / RATE, by_rate, "learning rate")
        drawn.append(RATE)
    return drawn


def density_curves(sweep: Sweep, found: Found) -> Curves:
    """Against the share of the model that is trained, in percent; at the tuned learning rate where it is tuned."""
    split = RATE_KEY not in sweep.tune and len({rate_of(cell) for cell, _ in found}) > 1

    def line(cell: Cell) -> str:
        return name_of(cell) + (f", lr {rate_of(cell):g}" if split else "")

    def share(cell: Cell, result: Mapping[str, Any]) -> float | None:
        total = result.get("total_parameters")
        return 100.0 * result["trainable_parameters"] / total if total else None

    return _curves(sweep, found, line, share, lambda result: result["adapted"])


def rate_curves(sweep: Sweep, found: Found) -> Curves:
    """Against the learning rate, by the validation score where there is one, as the choice is made: then of the runs that have it."""
    found = [(cell, result) for cell, result in found if result["adapted"].get("validation")] or found
    several = len({(name_of(cell), cell.row) for cell, _ in found}) > len({name_of(cell) for cell, _ in found})

    def line(cell: Cell) -> str:
        budget = cell.cfg.adapter.budget
        given = budget.density or budget.k or budget.like_lora_r
        return name_of(cell) + (f", {given:g}" if several and given else "")

    def held(result: Mapping[str, Any]) -> Mapping[str, Any]:
        figures: Mapping[str, Any] = result["adapted"]
        return figures.get("validation") or figures

    return _curves(sweep, found, line, lambda cell, _: rate_of(cell), held)


def name_of(cell: Cell) -> str:
    """The metric of a sparse run, the method of any other."""
    section = cell.cfg.adapter
    return section.metric if section.method == "sparse" else section.method


def rate_of(cell: Cell) -> float:
    """The learning rate, TrainingArguments' own where none is set."""
    return float(cell.cfg.train.get("learning_rate", 5e-5))


def _curves(
    sweep: Sweep, found: Found, line: Callable[[Cell], str], x_of: Callable[[Cell, Mapping[str, Any]], float | None],
    figures_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Curves:  # fmt: skip
    """Columns in which some line has two points or more; the others of such a column are drawn as points."""
    made: Curves = {}
    for column in dict.fromkeys(cell.column for cell, _ in found):
        mine = [(cell, result) for cell, result in found if cell.column == column]
        name = score_name(sweep, column, (figures_of(result) for _, result in mine))
        lines: dict[str, dict[float, list[float]]] = {}
        for cell, result in mine:
            x = x_of(cell, result)
            if x is not None:
                lines.setdefault(line(cell), {}).setdefault(x, []).append(scaled(name, figures_of(result)[name]))
        if any(len(points) > 1 for points in lines.values()):
            made[heading(column, {column: name})] = {title: list(_points(points.items())) for title, points in lines.items()}
    return made


def _points(values: Iterable[tuple[float, list[float]]]) -> Iterable[Point]:
    for x, scores in sorted(values):
        yield x, statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
