"""Where a run goes on: its newest whole checkpoint, if that is of the same batches, and whether any step is left."""

from __future__ import annotations

from pathlib import Path

from speft_core.errors import UserError

from . import checkpoints
from .config import RunConfig
from .context import Run


def checkpoint(run: Run, batch: int, total: int) -> Path | None:
    """The newest complete checkpoint; what a kill in mid-save left is removed. UserError if it is of other batches.

    batch: examples of one optimizer step over all processes. total: optimizer steps of the whole run.
    """

    def look() -> str | None:
        for name in checkpoints.remove_incomplete(run.folder.path):
            run.note(f"  {name} was not written to the end and is removed")
        found = checkpoints.complete(run.folder.path)
        if not found:
            return None
        _require_same(run.cfg, found[-1], batch, total, run.ranks.world)
        return found[-1].name

    name = run.ranks.on_main(look)
    return None if name is None else run.folder.path / name


def is_over(cfg: RunConfig, found: Path, total: int) -> bool:
    """Whether training had come to its end with this checkpoint: all steps, or as many as early stopping allowed."""
    patience = cfg.train.get("early_stopping_patience")
    counted = checkpoints.state(found).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    fruitless = counted.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return checkpoints.step_of(found) >= total or (patience is not None and fruitless >= patience)


def _require_same(cfg: RunConfig, found: Path, batch: int, total: int, world: int) -> None:
    """A position counted in steps means the same examples only with the same batches of the same data."""
    plan = checkpoints.plan(found)
    theirs, steps = plan.get(checkpoints.BATCH, batch), plan.get(checkpoints.STEPS, total)
    if theirs != batch:
        makes = "1 process makes" if world == 1 else f"{world} processes make"
        raise UserError(
            f"{found.name} was made with {theirs} examples a step, {makes} it {batch}, and the position in the data and the"
            f" schedule would jump; {_advice(cfg, theirs, world)}, or choose another output_dir"
        )
    if steps != total:
        raise UserError(
            f"{found.name} is of a run of {steps:,} steps; the training data and settings of this start make {total:,}: give it"
            " the same data, or choose another output_dir"
        )


def _advice(cfg: RunConfig, batch: int, world: int) -> str:
    """The settings that make so many examples a step of this config."""
    share, rest = divmod(batch, world)
    if rest:
        return f"start a number of processes that divides {batch}"
    micro = cfg.train.get("per_device_train_batch_size")
    if "gradient_accumulation_steps" not in cfg.train and (micro is None or share % micro == 0):
        return f"set train.global_batch_size={batch}"
    micro = next(size for size in range(min(share, micro or 8), 0, -1) if share % size == 0)
    return f"set train.per_device_train_batch_size={micro} train.gradient_accumulation_steps={share // micro}"
