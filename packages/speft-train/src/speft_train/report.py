"""report.md with its plots, and the table that ends a run in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from speft_core.files import atomic_write

from . import plots, results
from .config import to_yaml
from .context import Run

REPORT = "report.md"
MOST_MASKS = 12


def write(run: Run, found: dict[str, Any]) -> None:
    """Write report.md and the plots beside it."""
    folder = run.folder.path
    parts = [f"# {folder.name}", _summary(run, found), _markdown_table(found)]
    if plots.loss_curve(folder / plots.LOSS, found["history"]):
        parts += ["## Loss", f"![loss over steps]({plots.LOSS})"]
    densities = _densities(run)
    if densities and plots.density_map(folder / plots.DENSITY, densities):
        parts += ["## Where the trained scalars lie", f"![density by layer and module]({plots.DENSITY})"]
        parts.append(_modules(densities))
    if "dynamic" in found:
        parts += ["## Changes of the mask", results.change_table(found["dynamic"]), _overlaps(run)]
    examples = (found["adapted"] or {}).get("examples") or []
    if examples:
        parts += ["## Answers of the adapted model", *(_example(e) for e in examples)]
    if run.notes:
        parts += ["## Notes", "\n".join(f"- {line.strip()}" for line in run.notes)]
    parts += ["## Configuration", f"```yaml\n{to_yaml(run.cfg)}```"]
    atomic_write(folder / REPORT, "\n\n".join(part for part in parts if part) + "\n")


def print_summary(run: Run) -> None:
    """The final table, from results.json."""
    found = results.read(run.folder)
    table = Table(title=str(run.folder.path), title_justify="left", show_header=True)
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("adapted", justify="right")
    for row in results.figure_rows(found):
        table.add_row(*row)
    facts = Table(show_header=False)
    for fact in results.fact_rows(found):
        facts.add_row(*fact)
    for shown in ([table] if table.row_count else []) + [facts]:
        run.console.print(shown)
    run.say(f"adapter: {run.folder.path / 'adapter'}   report: {run.folder.path / REPORT}")


def _summary(run: Run, found: dict[str, Any]) -> str:
    part = results.share(found)
    share = f", {part:.3%} of all parameters" if part else ""
    trained = f"{found['trainable_parameters']:,} scalars trained{share}"
    return f"`{run.cfg.model.name}` adapted by method {found['method']}: {trained}."


def _markdown_table(found: dict[str, Any]) -> str:
    lines = []
    rows = results.figure_rows(found)
    if rows:
        lines += ["| | base | adapted |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in results.fact_rows(found))]
    return "\n".join(lines)


def _densities(run: Run) -> dict[str, float]:
    """Of the mask; of all that was ever trained and kept, where the mask changed."""
    import speft_core as sc

    from . import masks
    from .steps import ADAPTER, MASK

    path = run.folder.path / MASK
    if run.cfg.adapter.dynamic.interval is not None and run.cfg.adapter.method == "sparse":
        return masks.load(run.folder.path / ADAPTER).mask.densities()
    if run.mask is None and run.cfg.adapter.method == "sparse" and path.is_file():
        run.mask = sc.SparsityMask.load(path)
    return run.mask.densities() if run.mask is not None else {}


def _overlaps(run: Run) -> str:
    """The picture of what the masks share, at most MOST_MASKS of them."""
    from . import masks
    from .dynamic import MASKS

    files = sorted((run.folder.path / MASKS).glob("step-*.safetensors"))
    step = -(-len(files) // MOST_MASKS) if files else 1
    found = [masks.load(path) for path in (run.folder.path, *files[step - 1 :: step])]
    if len(found) < 2:
        return ""
    names = ["first", *(Path(m.name).stem for m in found[1:])]
    plots.overlap_matrix(run.folder.path / plots.OVERLAP, names, masks.overlaps([m.mask for m in found]))
    return f"![overlap of the masks]({plots.OVERLAP})"


def _modules(densities: dict[str, float]) -> str:
    """Mean density of each kind of module."""
    kinds: dict[str, list[float]] = {}
    for name, density in densities.items():
        kinds.setdefault(plots.place(name)[1], []).append(density)
    rows = [f"| {kind} | {len(d)} | {sum(d) / len(d):.3%} | {max(d):.3%} |" for kind, d in kinds.items()]
    return "\n".join(["| module | tensors | mean density | largest |", "|---|---:|---:|---:|", *rows])


def _example(example: dict[str, Any]) -> str:
    lines = [f"**{key}**: {' '.join(str(value).split())}" for key, value in example.items()]
    return "\n".join(f"- {line}" if i == 0 else f"  {line}" for i, line in enumerate(lines))
