"""`speft-train mask` and `speft-train inspect`: a mask alone, and where its scalars lie."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import speft_core as sc
from speft_core.errors import UserError
from speft_core.files import atomic_write

from . import plots

SUMMARY = "inspect.json"


def find(config: Path, overrides: list[str], output: Path | None) -> None:
    """Compute the mask of a run and save it: as `output`, or in the run's folder, where the run itself finds it."""
    from . import cli, refusals
    from .config import load_config
    from .folder import RunFolder

    console, cfg = Console(), load_config(config, overrides)
    if cfg.adapter.method != "sparse":
        raise UserError(f"a mask needs adapter.method sparse; got {cfg.adapter.method}")
    refusals.check(cfg)
    if output is not None and output.is_dir():
        raise UserError(f"--output must be a file for the mask; {output} is a folder")
    with tempfile.TemporaryDirectory(prefix="speft-mask-") as temporary:
        folder = RunFolder(cfg.output_dir if output is None else temporary)
        folder.check(cfg)

        def end(_run: Any) -> None:
            found = load(folder.path)
            if output is not None:
                found.mask.save(output)
            shown = Named(str(output or found.name), found.mask)
            report([shown], console, None)
            console.print(f"mask: {shown.name}", highlight=False, markup=False, soft_wrap=True)

        cli.run_checked(cfg, folder, console, only="mask", end=end)


@dataclass(frozen=True)
class Named:
    """A mask and what to call it."""

    name: str
    mask: sc.SparsityMask


def load(path: Path) -> Named:
    """A mask file, a run's folder (its mask), or an adapter's folder (the entries that it changes)."""
    if path.is_dir() and (path / "adapter_config.json").is_file():
        adapter = sc.SparseAdapter.load(path)
        shapes = {n: tuple(d.shape) for n, d in adapter.deltas.items()}
        made = {"metric": adapter.config.metric, "scope": adapter.config.scope, "seed": adapter.config.seed}
        return Named(str(path), sc.SparsityMask({n: d.indices_K for n, d in adapter.deltas.items()}, shapes, made))
    if path.is_dir():
        if not (path / "mask.safetensors").is_file():
            raise UserError(f"{path} must be a mask file, a run's folder or an adapter's; it has no mask.safetensors")
        path = path / "mask.safetensors"
    return Named(str(path), sc.SparsityMask.load(path))


def inspect(paths: Sequence[Path], output: Path | None, console: Console | None = None) -> None:
    """Print the density of each mask by layer and module, and how much they share; with `output`, draw both there."""
    report([load(path) for path in paths], console or Console(), output)


def report(masks: Sequence[Named], console: Console, output: Path | None) -> None:
    """See inspect."""
    names = _short([m.name for m in masks])
    for name, named in zip(names, masks, strict=True):
        console.print(f"{named.name}: {_about(named.mask)}", highlight=False, markup=False, soft_wrap=True)
        console.print(density_table(named.mask, name))
    shared = overlaps([m.mask for m in masks]) if len(masks) > 1 else []
    if shared:
        console.print(_overlap_table(names, shared))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, named in zip(names, masks, strict=True):
        file = output / ("density.png" if len(masks) == 1 else f"density-{_slug(name)}.png")
        if plots.density_map(file, named.mask.densities()):
            drawn.append(str(file))
    if shared:
        plots.overlap_matrix(output / plots.OVERLAP, names, shared)
        drawn.append(str(output / plots.OVERLAP))
    atomic_write(output / SUMMARY, json.dumps(_summary(masks, shared), indent=1) + "\n")
    console.print("wrote " + ", ".join([*drawn, str(output / SUMMARY)]), highlight=False, soft_wrap=True)


def overlaps(masks: Sequence[sc.SparsityMask]) -> list[list[float]]:
    """[i][j]: share of the entries of mask i that mask j has too. UserError for masks of different models."""
    for mask in masks[1:]:
        for name in mask.names:
            shape = masks[0].shapes.get(name, mask.shapes[name])
            if tuple(shape) != tuple(mask.shapes[name]):
                raise UserError(f"masks of different models cannot be compared: {name} is {shape} and {mask.shapes[name]}")
    return [[_shared(a, b) / max(1, a.nnz) for b in masks] for a in masks]


def _shared(a: sc.SparsityMask, b: sc.SparsityMask) -> int:
    return sum(int(torch.isin(i, b.indices[n].to(i.dtype)).sum()) for n, i in a.indices.items() if n in b.indices)


def density_table(mask: sc.SparsityMask, title: str) -> Table:
    """Layers down, modules across, densities in percent; a last row and column for all."""
    layers, modules, cells = plots.density_table(mask.densities())
    counts, sizes = _totals(mask)
    table = Table(title=f"{title}: density, % of the tensor", title_justify="left")
    for heading in ("layer", *modules, "all"):
        table.add_column(heading.replace(".", ".\u200b"), justify="right", overflow="fold")
    for layer, row in zip(layers, cells, strict=True):
        table.add_row(layer, *map(_percent, row), _percent(counts[layer, None] / max(1, sizes[layer, None])))
    ends = [counts[None, module] / max(1, sizes[None, module]) for module in modules]
    table.add_section()
    table.add_row("all", *map(_percent, ends), _percent(mask.nnz / max(1, mask.numel)))
    return table


def _totals(mask: sc.SparsityMask) -> tuple[dict[Any, int], dict[Any, int]]:
    """Entries kept, and scalars, by (layer, None) and (None, module)."""
    counts: dict[Any, int] = {}
    sizes: dict[Any, int] = {}
    for name, indices in mask.indices.items():
        layer, module = plots.place(name)
        for place in ((layer, None), (None, module)):
            counts[place] = counts.get(place, 0) + indices.numel()
            sizes[place] = sizes.get(place, 0) + math.prod(mask.shapes[name])
    return counts, sizes


def _overlap_table(names: Sequence[str], shared: Sequence[Sequence[float]]) -> Table:
    table = Table(title="overlap: share of the row's entries that the column has too", title_justify="left")
    for heading in ("", *names):
        table.add_column(heading, justify="right", overflow="fold")
    for name, row in zip(names, shared, strict=True):
        table.add_row(name, *(f"{share:.3f}" for share in row))
    return table


def _about(mask: sc.SparsityMask) -> str:
    made = {k: v for k, v in mask.made.items() if k in ("metric", "scope", "structure", "seed", "examples") and v is not None}
    said = "".join(f", {key} {value}" for key, value in made.items())
    empty = sum(not i.numel() for i in mask.indices.values())
    rest = f", {empty} of them without any" if empty else ""
    return (
        f"k = {mask.nnz:,} of {mask.numel:,} in {len(mask.indices)} tensors ({mask.nnz / max(1, mask.numel):.3%}){rest}{said}"
    )


def _summary(masks: Sequence[Named], shared: Sequence[Sequence[float]]) -> dict[str, Any]:
    listed = [
        {"mask": m.name, "k": m.mask.nnz, "of": m.mask.numel, "made": _plain(m.mask.made), "density": m.mask.densities()}
        for m in masks
    ]
    return {"masks": listed, "overlap": shared}


def _plain(made: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in made.items() if isinstance(value, (str, int, float, bool, list, dict))}


def _short(names: Sequence[str]) -> list[str]:
    """What tells the names apart: without the folders that all share, and without mask.safetensors where that is enough."""
    parts = [Path(n).parts for n in names]
    same = 0
    while len(names) > 1 and all(len(p) > same + 1 for p in parts) and len({p[same] for p in parts}) == 1:
        same += 1
    shortened = ["/".join(p[same if len(names) > 1 else -1 :]) for p in parts]
    bare = [n.removesuffix("/mask.safetensors").removesuffix(".safetensors") for n in shortened]
    return bare if len(set(bare)) == len(bare) else shortened


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.2f}" if share >= 0.0001 or share == 0 else f"{100 * share:.4f}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in name)
