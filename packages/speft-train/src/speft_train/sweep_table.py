"""The table of a sweep as papers print it (mean ± sd over seeds, the best in bold, count of wins): Markdown, LaTeX, CSV,
and a plot.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speft_core.errors import UserError
from speft_core.files import atomic_write

from . import plots
from .sweep_config import LOWER_IS_BETTER, SCORES, Cell, Sweep

MARKDOWN, LATEX, CSV, PLOT = "table.md", "table.tex", "table.csv", "scores.png"
Found = Sequence[tuple[Cell, Mapping[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One place of the table: the mean over seeds, in percent where a share is shown."""

    mean: float
    sd: float | None
    count: int


def score_name(sweep: Sweep, column: str, figures: Iterable[Mapping[str, Any] | None]) -> str:
    """The figure by which these runs of a column are compared: the one that is set, else the first of SCORES that all have.
    Scale and direction follow from it. UserError where a run lacks it.
    """
    runs, wanted = [found or {} for found in figures], sweep.score(column)
    for name in (wanted,) if wanted else SCORES:
        if all(name in found for found in runs):
            return name
    had = sorted({name for found in runs for name in SCORES if name in found})
    raise UserError(
        f"sweep.columns.{column}.score must be a figure that all of its runs have; got {wanted or 'none'}, and their figures are"
        f" {', '.join(had) or 'none (evaluate.enabled=false?)'}"
    )


def scaled(name: str, value: float) -> float:
    """As it is printed: percent of a share, a loss as it is."""
    return float(value) if name in LOWER_IS_BETTER else 100.0 * value


def goodness(name: str, value: float) -> float:
    """More is better; a loss that is no number is worse than any."""
    if math.isnan(value):
        return -math.inf
    return -value if name in LOWER_IS_BETTER else float(value)


def score_names(sweep: Sweep, found: Found) -> dict[str, str]:
    """Column -> the figure that it shows, of those in which something has run."""
    of = {column: [result["adapted"] for cell, result in found if cell.column == column] for column in sweep.columns}
    return {column: score_name(sweep, column, figures) for column, figures in of.items() if figures}


def entries(sweep: Sweep, found: Found) -> dict[tuple[str, str], Entry]:
    """(row, column) -> its entry, of what has run."""
    names, scores = score_names(sweep, found), dict[tuple[str, str], list[float]]()
    for cell, result in found:
        name = names[cell.column]
        scores.setdefault((cell.row, cell.column), []).append(scaled(name, result["adapted"][name]))
    return {
        place: Entry(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
        for place, values in scores.items()
    }


def averages(sweep: Sweep, table: Mapping[tuple[str, str], Entry]) -> dict[str, Entry]:
    """Row -> mean over the columns; only for rows that have them all. The sd is that of the mean's seeds, assuming that
    columns vary independently.
    """
    made = {}
    for row in sweep.rows:
        cells = [table[row, column] for column in sweep.columns if (row, column) in table]
        if len(cells) == len(sweep.columns):
            spread = [cell.sd for cell in cells if cell.sd is not None]
            sd = math.sqrt(sum(s * s for s in spread)) / len(cells) if len(spread) == len(cells) else None
            made[row] = Entry(statistics.fmean(cell.mean for cell in cells), sd, min(cell.count for cell in cells))
    return made


def winners(sweep: Sweep, table: Mapping[tuple[str, str], Entry], names: Mapping[str, str]) -> dict[str, str]:
    """Column -> the row with the best mean."""
    made = {}
    for column in sweep.columns:
        rows = [row for row in sweep.rows if (row, column) in table]
        if rows:
            made[column] = max(rows, key=lambda row: goodness(names[column], table[row, column].mean))
    return made


def write(sweep: Sweep, found: Found) -> None:
    """Write all forms of the table into the sweep's folder."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    atomic_write(sweep.folder / MARKDOWN, markdown(sweep, found))
    atomic_write(sweep.folder / LATEX, latex(sweep, found))
    atomic_write(sweep.folder / CSV, long_csv(sweep, found))
    table, names = entries(sweep, found), score_names(sweep, found)
    if table:
        rows = {column: [row for row in sweep.rows if (row, column) in table] for column in names}
        means = {heading(c, names): {row: table[row, c].mean for row in rows[c]} for c in names}
        spreads = {heading(c, names): {row: table[row, c].sd or 0.0 for row in rows[c]} for c in names}
        plots.score_bars(sweep.folder / PLOT, means, spreads)


def heading(column: str, names: Mapping[str, str]) -> str:
    """A column's name, and that less is better in it."""
    name = names.get(column)
    return f"{column} ({name})" if name in LOWER_IS_BETTER else column


def grid(sweep: Sweep, found: Found) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """(headings, rows of (text, whether it is the best)). A share and a loss have no mean: neither scale nor direction fits."""
    names, table = score_names(sweep, found), entries(sweep, found)
    best, means = winners(sweep, table, names), averages(sweep, table)
    several = len(sweep.columns) > 1
    averaged = several and len({name in LOWER_IS_BETTER for name in names.values()}) <= 1
    top = max(means, key=lambda row: goodness(next(iter(names.values())), means[row].mean)) if means else None
    counts = dict.fromkeys(sweep.rows, 0)
    for row in best.values():
        counts[row] += 1
    trained = {cell.row: result["trainable_parameters"] for cell, result in found}
    headings = ["", "trained", *(heading(column, names) for column in sweep.columns)]
    headings += [*(["mean"] if averaged else []), *(["wins"] if several else [])]
    rows = []
    for row in sweep.rows:
        line = [(row, False), (f"{trained[row]:,}" if row in trained else "-", False)]
        line += [(_text(table.get((row, column))), best.get(column) == row) for column in sweep.columns]
        if averaged:
            line.append((_text(means.get(row)), row == top))
        if several:
            line.append((str(counts[row]), False))
        rows.append(line)
    return headings, rows


def markdown(sweep: Sweep, found: Found) -> str:
    """For reading."""
    headings, rows = grid(sweep, found)
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    lines += [f"| {' | '.join(f'**{text}**' if best else text for text, best in row)} |" for row in rows]
    lower = dict.fromkeys(LOWER_IS_BETTER, " (lower is better)")
    shown = ", ".join(f"{column}: {name}{lower.get(name, '')}" for column, name in score_names(sweep, found).items())
    return "\n".join(lines) + f"\n\nMean ± sd over seeds {', '.join(map(str, sweep.seeds))}{'; ' + shown if shown else ''}.\n"


def latex(sweep: Sweep, found: Found) -> str:
    """A booktabs table."""
    headings, rows = grid(sweep, found)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}", r"\toprule", f"{' & '.join(map(_tex, headings))} \\\\"]
    lines.append(r"\midrule")
    lines += [" & ".join(rf"\textbf{{{_tex(t)}}}" if best else _tex(t) for t, best in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def long_csv(sweep: Sweep, found: Found) -> str:
    """One line a run, with all its figures."""
    tuned = list(sweep.tune)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    facts = ("trainable_parameters", "total_parameters", "adapter_bytes", "steps", "saliency_seconds", "train_seconds")
    held_names = [f"validation_{score}" for score in SCORES]
    writer.writerow(["row", "column", "seed", *tuned, *SCORES, *held_names, *facts, "peak_memory_bytes"])
    for cell, result in found:
        figures = result["adapted"]
        held = figures.get("validation") or {}
        values = [figures.get(s) for s in SCORES] + [held.get(s) for s in SCORES]
        chosen = [dict(cell.tuned).get(key) for key in tuned]
        extra = [result.get(key) for key in (*facts, "peak_memory_bytes")]
        writer.writerow([cell.row, cell.column, cell.seed, *chosen, *("" if v is None else v for v in values + extra)])
    return text.getvalue()


def _text(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    return f"{entry.mean:.2f}" + ("" if entry.sd is None else f" ± {entry.sd:.2f}")


def _tex(text: str) -> str:
    escaped = "".join("\\" + c if c in "&%$#_{}" else c for c in text)
    return escaped.replace("±", r"$\pm$")
