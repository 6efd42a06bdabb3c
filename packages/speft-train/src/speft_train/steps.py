"""What each stage does: from the run so far to what it adds, and the figures that are recorded."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from speft_core.errors import UserError
from speft_core.files import atomic_folder, atomic_write

from . import checkpoints, refusals, shards, training_args
from .config import to_yaml
from .context import Run

Result = dict[str, Any]
ADAPTER, MASK = "adapter", "mask.safetensors"
SHOWN = ("exact_match", "exact_match_last_number", "accuracy", "accuracy_per_character", "loss")


def load(run: Run) -> Result:
    """Model, tokenizer, data; on the accelerator if there is one."""
    import torch
    from transformers.utils import logging

    from . import classification, data, models

    if not run.shows_progress:
        logging.disable_progress_bar()
    classifies = run.cfg.model.task == "sequence_classification"
    if run.cfg.model.name.startswith("bundled:"):
        run.ranks.on_main(lambda: str(models.locate(run.cfg.model)))  # rank 0 converts it, the others find it made
    if classifies:
        classification.load(run)
    else:
        run.model, run.tokenizer = models.load_model(run.cfg, world=run.ranks.world)
    dtype = str(run.model.dtype).removeprefix("torch.")
    refusals.check(run.cfg, dtype)
    if torch.cuda.is_available() and not run.cfg.train.get("use_cpu"):
        run.model.to(torch.device("cuda", run.ranks.local_rank))
    idle = training_args.idle_gpus(run.cfg, run.ranks.world)
    if idle is not None:
        run.say(f"  {idle}")
    if not classifies:
        run.data = data.build(run.cfg, run.tokenizer)
    for line in run.data.summary(run.cfg.data):
        run.say(f"  {line}")
    total = shards.total(run.model)
    run.say(f"  {run.cfg.model.name}: {total:,} parameters in {dtype}")
    return {"total_parameters": total}


def evaluate_base(run: Run) -> Result:
    """The model before anything is attached."""
    return {"figures": _evaluate(run, run.model)}


def find_mask(run: Run) -> Result:
    """The ranks score, rank 0 chooses; the mask's file is what all of them read."""
    from . import scoring

    started = time.perf_counter()
    path = run.folder.path / MASK

    def keep(mask: Any) -> int:
        mask.save(path)
        return int(mask.nnz)

    if run.cfg.adapter.mask or run.ranks.world == 1:
        k = run.ranks.on_main(lambda: keep(_ready_mask(run) if run.cfg.adapter.mask else scoring.score(run)))
    else:
        k = scoring.score_together(run, keep)
    total = shards.total(run.model)
    run.say(f"  k = {k:,} of {total:,} parameters ({k / total:.3%})")
    return {"k": k, "saliency_seconds": round(time.perf_counter() - started, 3)}


def attach(run: Run) -> Result:
    """Make the masked scalars (or LoRA's, or all) trainable."""
    import speft_core as sc

    from .methods import METHODS

    method = METHODS[run.cfg.adapter.method]
    if method.needs_mask:
        run.mask = sc.SparsityMask.load(run.folder.path / MASK)
    run.attached = method.attach(run.model, run.cfg, run.mask)
    run.say(f"  {run.attached.trainable:,} trainable parameters{run.attached.about}")
    return {"trainable_parameters": run.attached.trainable}


def train(run: Run) -> Result:
    """See training.py."""
    from . import training

    return training.train(run)


def save(run: Run) -> Result:
    """Rank 0 writes the adapter folder, whole or not at all; then the model is the base again."""
    from . import card

    attached = run.attached
    assert attached is not None
    folder = run.folder.path / ADAPTER
    write = attached.collect(run.ranks.is_main)

    def work() -> int:
        checkpoints.require_space(run.folder.path, 8 * attached.trainable, "the adapter")
        with atomic_folder(folder) as beside:
            write(beside)
            if not (beside / "config.json").exists():
                atomic_write(beside / "config.json", run.model.config.to_json_string())
            atomic_write(beside / "training_config.yaml", to_yaml(run.cfg))
            atomic_write(beside / "README.md", card.text(run))
        best = bool(run.cfg.train.get("load_best_model_at_end"))
        checkpoints.settle(run.folder.path, training_args.kept(run.cfg), best)
        return sum(f.stat().st_size for f in folder.glob("*.safetensors"))

    size = run.ranks.on_main(work)
    attached.detach()
    run.attached = None
    run.say(f"  {folder}: {size:,} bytes")
    return {"adapter_bytes": size}


def evaluate_adapted(run: Run) -> Result:
    """The base with the saved folder on it: what is measured is what ships."""
    from .methods import METHODS

    applied = METHODS[run.cfg.adapter.method].applied
    with applied(run.model, run.cfg, run.folder.path / ADAPTER, run.ranks.world) as model:
        return {"figures": _evaluate(run, model)}


def report(run: Run) -> Result:
    """results.json, report.md, the plots, the card; the table in the terminal."""
    from . import card, results
    from . import report as report_file

    def work() -> None:
        found = results.collect(run.folder, run.cfg)
        results.write(run.folder, found)
        report_file.write(run, found)
        atomic_write(run.folder.path / ADAPTER / "README.md", card.text(run, found))

    run.ranks.on_main(work)
    return {}


def _ready_mask(run: Run) -> Any:
    import speft_core as sc

    assert run.cfg.adapter.mask is not None
    mask = sc.SparsityMask.load(Path(run.cfg.adapter.mask))
    mask.check_model(run.model)
    return mask


def _evaluate(run: Run, model: Any) -> Result:
    """Figures on the test data. Each rank takes a share of the rows."""
    from . import classification, data, evaluate, label_rows

    if run.cfg.model.task == "sequence_classification":
        return classification.evaluate(run, model)
    settings, ranks = run.cfg.evaluate, run.ranks
    figures: Result = {}
    if run.cfg.data.template == "multiple_choice" and run.data.test_rows:
        rows = ranks.share(list(run.data.test_rows[: settings.limit]))
        with shards.evaluating(model, ranks):
            found = evaluate.choose(model, run.tokenizer, rows, run.cfg, progress=run.shows_progress) if rows else {}
        figures |= _mean(ranks.gather(found), "count")
    elif settings.generation and run.data.test_rows:
        rows = ranks.share(list(run.data.test_rows[: settings.limit]))
        found = {}
        with shards.evaluating(model, ranks):
            if rows:
                found = evaluate.generate_exact_match(model, run.tokenizer, rows, run.cfg, progress=run.shows_progress)
        figures |= _mean(ranks.gather(found), "count")
    if settings.loss and run.data.test is not None:
        count = len(run.data.test) if settings.limit is None else min(settings.limit, len(run.data.test))
        part = [run.data.test[i] for i in ranks.share(list(range(count)))]
        found = {}
        with shards.evaluating(model, ranks):
            if part:
                ids, labels = [e["input_ids"] for e in part], [e["labels"] for e in part]
                mine = data.TokenDataset(ids, [[label != label_rows.IGNORED for label in row] for row in labels])
                collate = data.collator(run.tokenizer, model)
                found = evaluate.held_out_loss(model, mine, collate, settings.batch_size, progress=run.shows_progress)
        figures |= _mean(ranks.gather(found), "tokens")
        figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
    if not figures:
        raise UserError(
            "evaluate has nothing to measure: set data.test and one of evaluate.generation and evaluate.loss,"
            " or evaluate.enabled=false"
        )
    run.say("  " + ", ".join(f"{name} {figures[name]:.4f}" for name in SHOWN if name in figures))
    return figures


def _mean(parts: list[Result], weight: str) -> Result:
    """The ranks' figures as one: means weighted by what each has counted, their sum, the first rank's examples."""
    parts = [part for part in parts if part.get(weight)]
    total = sum(part[weight] for part in parts)
    made: Result = {weight: total}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "seconds":
            made[name] = max(values)
        elif isinstance(values[0], float):
            made[name] = sum(v * part[weight] for v, part in zip(values, parts, strict=True)) / total
        elif name != weight:
            made[name] = values[0]
    return made
