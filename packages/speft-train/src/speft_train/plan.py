"""`--dry-run`: what a run would do and need, from the model's configuration alone: no weights, no data."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from speft_core.targets import base_parameters, resolve_targets

from . import engine, methods, methods_peft, models, training_args
from .config import RunConfig, batch_plan
from .folder import RunFolder
from .planning import GRADIENT, INDEX, LAYOUT, MASTER, MOMENTS, VALUE, accumulators
from .stages import STAGES, is_done


def show(cfg: RunConfig, world: int, console: Console) -> None:
    """Print the stages, the budget, the memory and the effective batch of a run."""
    console.print(_stages(cfg))
    model = models.meta_model(cfg)
    parameters = base_parameters(model)
    total = sum(p.numel() for p in parameters.values())
    names = resolve_targets(model, cfg.adapter.targets)
    pool = sum(parameters[n].numel() for n in names)
    k = methods.trained_count(model, cfg, names)
    console.print(_targets(parameters, names))
    dtype = str(model.dtype).removeprefix("torch.")
    console.print(f"model: {cfg.model.name}, {total:,} parameters in {dtype}", highlight=False)
    console.print(
        f"budget: k = {k:,} trained by method {cfg.adapter.method}; {k / total:.2%} of all parameters,"
        f" {k / pool:.2%} of the {pool:,} in {len(names)} targets",
        highlight=False,
    )
    per_device, accumulation = batch_plan(cfg, world)
    console.print(
        f"effective batch: {per_device * accumulation * world} = {per_device} a device"
        f" x {accumulation} accumulation steps x {world} process{'es' if world > 1 else ''}; {_steps(cfg, world)}",
        highlight=False,
    )
    console.print(_memory(cfg, model, k, pool, world))
    console.print("Dry run: nothing was loaded, trained or written.", highlight=False)


def _steps(cfg: RunConfig, world: int) -> str:
    steps, epochs = cfg.train.get("max_steps", -1), cfg.train.get("num_train_epochs", 3)
    if steps > 0:
        return f"{steps:,} steps"
    if cfg.data.train_size is None:
        return f"{epochs:g} epochs"
    made = math.ceil(epochs * (cfg.data.train_size // training_args.global_batch(cfg, world)))
    return f"{epochs:g} epochs of {cfg.data.train_size:,} examples, {made:,} steps"


def _stages(cfg: RunConfig) -> Table:
    folder = RunFolder(cfg.output_dir)
    records = folder.records() if folder.path.is_dir() else {}
    table = Table(title="stages", title_justify="left")
    for heading in ("stage", "what it does", ""):
        table.add_column(heading)
    for stage in STAGES:
        done = stage.name in records and not stage.serves and is_done(stage, cfg, folder)
        state = "off" if not stage.wanted(cfg) else "done" if done else ""
        table.add_row(stage.name, stage.about, state)
    return table


def _targets(parameters: dict[str, Any], names: list[str]) -> Table:
    """Targets by kind: last name of the module and shape."""
    kinds = Counter((n.removesuffix(".weight").rpartition(".")[2], tuple(parameters[n].shape)) for n in names)
    table = Table(title="targets", title_justify="left")
    for heading in ("module", "shape", "tensors", "parameters"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for (kind, shape), count in kinds.items():
        table.add_row(kind, " x ".join(map(str, shape)), str(count), f"{count * math.prod(shape):,}")
    return table


def memory_rows(cfg: RunConfig, model: Any, k: int, pool: int, world: int) -> list[tuple[str, int]]:
    """(what, bytes on each device) while training, without what is offloaded; kept activations come on top."""
    on = engine.is_enabled(cfg.deepspeed)
    zero = engine.settings(cfg.deepspeed)["zero_optimization"] if on else {}
    stage = int(zero.get("stage", 0))
    host = engine.offloaded(zero, stage)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = model.dtype.itemsize
    sharded = world if stage >= 1 else 1
    shards = world if stage == 3 else 1
    rows = [("weights", 0 if "weights" in host else weights // shards)]
    if cfg.adapter.method == "sparse":
        rows += [("values (float32)", VALUE * k), ("indices and base entries", (INDEX + LAYOUT + size) * k)]
    elif cfg.adapter.method in methods_peft.KINDS:
        rows.append((f"{cfg.adapter.method} matrices (float32)", VALUE * k))
    rows.append(("gradients", (size if cfg.adapter.method == "full" else GRADIENT) * k // (world if stage >= 2 else 1)))
    moments = 2 * size if cfg.adapter.method == "full" and stage == 0 else MOMENTS
    held = 0 if "optimizer" in host else moments + (MASTER if stage >= 1 else 0)
    rows.append(("optimizer", held * k // sharded))
    rows.append(("sum", sum(count for _, count in rows)))
    if scores := accumulators(cfg.adapter, pool // shards):
        before = 0 if shards > 1 and "weights" in host else weights // shards
        rows.append(("weights + saliency accumulators, before training", before + scores))
    return rows


def _memory(cfg: RunConfig, model: Any, k: int, pool: int, world: int) -> Table:
    table = Table(title="memory a device, without activations", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for what, count in memory_rows(cfg, model, k, pool, world):
        table.add_row(what, f"{count / 2**30:.3f}")
    return table
