"""What each stage does: from the run so far to what it adds, and the figures that are recorded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from speft_core.files import atomic_folder, atomic_write

from . import checkpoints, measure, refusals, shards, training_args
from .config import to_yaml
from .context import Run

Result = dict[str, Any]
ADAPTER, MASK = "adapter", "mask.safetensors"


def load(run: Run) -> Result:
    """Tokenizer and data, then the model, on the accelerator if there is one: it takes longest, and tells least of what is wrong."""
    import torch
    from transformers.utils import logging

    from . import classification, data, models, positions

    if not run.shows_progress:
        logging.disable_progress_bar()
    classifies = run.cfg.model.task == "sequence_classification"
    if run.cfg.model.name.startswith("bundled:"):
        run.ranks.on_main(lambda: str(models.locate(run.cfg.model)))  # rank 0 converts it, the others find it made
    if "train" in run.todo:
        training_args.check(run.cfg, run.ranks.world)
    if classifies:
        space = classification.load_data(run)
        _check_data(run)
        classification.load_model(run, space)
    else:
        config = models.load_model_config(run.cfg)  # what is no decoder is told before the data are read
        run.tokenizer = models.load_tokenizer(run.cfg)
        run.data = data.build(run.cfg, run.tokenizer)
        _check_data(run)
        positions.check(run, config, measure.splits(run, run.cfg.evaluate.validation) if _measures(run) else [])
        run.model, _ = models.load_model(run.cfg, tokenizer=run.tokenizer, world=run.ranks.world)
    dtype = str(run.model.dtype).removeprefix("torch.")
    refusals.check(run.cfg, dtype)
    if torch.cuda.is_available() and not run.cfg.train.get("use_cpu"):
        run.model.to(torch.device("cuda", run.ranks.local_rank))
    idle = training_args.idle_gpus(run.cfg, run.ranks.world)
    if idle is not None:
        run.say(f"  {idle}")
    for line in run.data.summary(run.cfg.data):
        run.say(f"  {line}")
    total = shards.total(run.model)
    run.say(f"  {run.cfg.model.name}: {total:,} parameters in {dtype}")
    return {"total_parameters": total}


def _check_data(run: Run) -> None:
    """What the data tell of the stages to come, while the model is not loaded and nothing is recorded."""
    if "train" in run.todo:
        training_args.check_data(run.cfg, run.ranks.world, run.data)
    if _measures(run):
        measure.check_data(run)


def _measures(run: Run) -> bool:
    return bool({"base", "evaluate"} & set(run.todo))


def evaluate_base(run: Run) -> Result:
    """The model before anything is attached."""
    return {"figures": measure.figures(run, run.model)}


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
        return {"figures": measure.figures(run, model, run.cfg.evaluate.validation)}


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
