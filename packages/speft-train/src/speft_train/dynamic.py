"""A mask that changes while the Trainer trains (`adapter.dynamic`): when, on which examples, what is kept of it.

Every `interval` optimizer steps rank 0 chooses a new mask on fresh training examples and all ranks go on with it. The
change happens before the checkpoint of the same step is written, so a run that is killed, also in mid-change, comes back
to a state from which it takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import speft_core as sc
from speft_core.remask import union_size

from . import scoring
from .context import Run
from .memory import bytes_of

MASKS = "masks"  # folder of the masks that followed the first one


def build(run: Run) -> sc.DynamicMask | None:
    """What changes the mask of this run; None when it stays."""
    section = run.cfg.adapter
    settings = section.dynamic
    if settings.interval is None:
        return None
    assert run.attached is not None and run.attached.tuner is not None
    metric = scoring.metric_of(run.cfg, run.model)
    return sc.DynamicMask(
        tuner=run.attached.tuner,
        batches=lambda number: scoring.calibration(run, settings.examples, number),
        interval=settings.interval,
        policy=settings.policy,
        metric=metric,
        scope=section.scope,
        loss_fn=scoring.loss_of(run),
        memory_limit=bytes_of(section.memory_limit),
        find_options=scoring.options_of(section, metric),
        optimizer_state="keep" if settings.keep_optimizer_state else "clear",
        swap=settings.swap,
        stop_after=settings.stop_after,
        agree=run.ranks.on_main,
    )


class ChangeMask(TrainerCallback):
    """Counts optimizer steps, not micro-batches, and changes the mask when it is time."""

    def __init__(self, dynamic: sc.DynamicMask, folder: Path, is_main: bool, say: Callable[[str], None]) -> None:
        self.dynamic, self.folder, self.is_main, self.say = dynamic, folder / MASKS, is_main, say

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Runs after the optimizer's step and before a checkpoint of it."""
        if not self.dynamic.after_step(optimizer, last=state.global_step >= state.max_steps):
            return
        change = self.dynamic.changes[-1]
        if self.is_main:
            self.folder.mkdir(exist_ok=True)
            self.dynamic.tuner.mask.save(self.folder / f"step-{change['step']:06d}.safetensors")
        self.say(
            f"  step {change['step']}: new mask, {change['kept'] / max(1, change['active']):.1%} as before;"
            f" {change['active']:,} train, {change['union']:,} in all"
        )


def finish(run: Run, dynamic: sc.DynamicMask) -> dict[str, Any]:
    """Prune to the final budget, if there is one; the figures for results.json."""
    found = dynamic.report()
    wanted = run.cfg.adapter.dynamic.final_budget
    if wanted is None:
        return found
    k = dynamic.k if wanted == "k" else int(wanted)
    before = run.ranks.on_main(lambda: _loss(run, dynamic))
    cost: dict[str, Any] = dict(dynamic.prune(k))
    after = run.ranks.on_main(lambda: _loss(run, dynamic))
    cost |= {"loss_before": before, "loss_after": after}
    run.note(
        f"  pruned to {cost['kept']:,} of {found['union']:,} entries: {cost['lost']:.2%} of the squared change is gone,"
        f" loss on {run.cfg.adapter.dynamic.examples} training examples {before:.4f} -> {after:.4f}"
    )
    return {**found, "union": union_size(dynamic.tuner), "pruned": {"union": found["union"], **cost}}


@torch.no_grad()
def _loss(run: Run, dynamic: sc.DynamicMask) -> float:
    """Mean loss over the examples that a next change would read."""
    loss_fn, training = scoring.loss_of(run), run.model.training
    run.model.eval()
    total, count = 0.0, 0
    for batch in scoring.calibration(run, run.cfg.adapter.dynamic.examples, len(dynamic.changes) + 1):
        size = len(batch["labels"])
        loss = loss_fn(run.model, batch) if loss_fn else run.model(**batch).loss
        total, count = total + loss.item() * size, count + size
    run.model.train(training)
    return total / count
