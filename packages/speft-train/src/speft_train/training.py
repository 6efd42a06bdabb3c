"""The train stage: build the Trainer, resume from the newest complete checkpoint, train, and check that the ranks
agree.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import speft_core as sc
from speft_core.errors import UserError
from speft_core.partitioned import is_partitioned, whole
from speft_core.remask import union

from . import checkpoints, contents, dynamic, engine, memory, resuming, training_args
from .context import Run
from .sampler import steps_in_all
from .signals import Stopped

Result = dict[str, Any]
# Figures of a log line that the report and results.json take up.
KEPT = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate")


def train(run: Run) -> Result:
    """Train what is attached; raises Stopped after a signal, with a checkpoint behind it."""
    from .tensorboard_log import TensorBoard

    assert run.attached is not None
    args = training_args.build(run.cfg, run.ranks, run.folder.path)
    batch = training_args.global_batch(run.cfg, run.ranks.world)
    total = steps_in_all(len(run.data.train), batch, args.max_steps, args.num_train_epochs)
    checkpoint = resuming.checkpoint(run, batch, total)
    changes = dynamic.build(run)
    before = run.folder.result("train").get("train_seconds", 0.0) if checkpoint else 0.0
    with _cache_as_before(run.model.config):
        trainer = _trainer(run, args, changes)
        memory.reset_peak()
        started = time.perf_counter()
        ordinary = [p for p in run.attached.model.parameters() if not is_partitioned(p)]
        try:
            if checkpoint is not None and resuming.is_over(run.cfg, checkpoint, total):
                checkpoints.load(run.attached.model, checkpoints.shipped(checkpoint, args.load_best_model_at_end), changes)
                history = _kept(checkpoints.state(checkpoint).get("log_history", []))
            else:
                history = _loop(run, trainer, checkpoint)
        finally:
            for callback in trainer.callback_handler.callbacks:  # the Trainer tells them of the end, but not of an error
                if isinstance(callback, TensorBoard):
                    callback.file.close()
    seconds = before + time.perf_counter() - started
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    run.model.eval()
    result = {
        "steps": max(trainer.state.global_step, checkpoints.step_of(checkpoint) if checkpoint else 0),
        "train_seconds": round(seconds, 3),
        "peak_memory_bytes": max(run.ranks.gather(memory.peak_bytes())),
        "global_batch_size": batch,
        "world_size": run.ranks.world,
        "trainable_parameters": run.attached.trainable,
        "history": history,
    }
    _stop_if_asked(run, result, total)
    result |= _shares(run, trainer)
    engine.take_back(trainer.model_wrapped, run.attached.model, ordinary)
    if run.attached.tuner is not None:
        run.attached.tuner.sync()
    _require_finite(run)
    if changes is not None:
        result["dynamic"] = dynamic.finish(run, changes)
    result["digest"] = _same_on_all_ranks(run)
    return result


@contextmanager
def _cache_as_before(config: Any) -> Iterator[None]:
    """The Trainer turns the cache of keys and values off as soon as it is made; the configuration that ships is the model's own."""
    missing = object()
    before = getattr(config, "use_cache", missing)
    try:
        yield
    finally:
        if before is not missing:
            config.use_cache = before
        elif hasattr(config, "use_cache"):  # an encoder's, which the Trainer gave one
            del config.use_cache


def _stop_if_asked(run: Run, result: Result, total: int) -> None:
    """Stopped on all ranks if any got a signal while training, be it after the last step."""
    signum = run.ranks.max(run.request.signum or 0)
    if not signum:
        return
    run.request.note(signum)

    def leave() -> str | None:
        run.folder.finish("train", "unfinished", result)
        found = checkpoints.complete(run.folder.path)
        return found[-1].name if found else None

    name = run.ranks.on_main(leave)
    rest = f"{name} is saved, the same command goes on from it" if name else "no checkpoint was written, training starts anew"
    raise Stopped(signum, f"stopped after step {result['steps']} of {total}; {rest}", by_all=True)


def _trainer(run: Run, args: Any, changes: sc.DynamicMask | None) -> Any:
    from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

    from . import callbacks, tensorboard_log, trainer

    assert run.attached is not None
    extra: list[Any] = []
    if changes is not None:
        extra.append(dynamic.ChangeMask(changes, run.folder.path, run.ranks.is_main, run.say))
    if run.ranks.is_main:
        extra.append(callbacks.Progress() if run.shows_progress else callbacks.Lines(run.say))
    if training_args.wants_tensorboard(run.cfg) and run.ranks.is_main:
        extra.append(tensorboard_log.TensorBoard(run.folder.path / "tensorboard"))
    patience = run.cfg.train.get("early_stopping_patience")
    if patience is not None:
        extra.append(EarlyStoppingCallback(early_stopping_patience=patience))
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if evaluates and run.data.validation is None:
        raise UserError("train.eval_strategy needs data.validation or data.validation_from_train; neither is set")
    made = trainer.RunTrainer(
        model=run.attached.model,
        args=args,
        train_dataset=run.data.train,
        eval_dataset=run.data.validation if evaluates else None,
        data_collator=run.data.collator(run.tokenizer),
        callbacks=extra,
        **_of_task(run),
        ranks=run.ranks,
        global_batch=training_args.global_batch(run.cfg, run.ranks.world),
        lengths=run.data.train.lengths,
        stop=callbacks.StopOnSignal(run.request, run.ranks),
        keep=training_args.kept(run.cfg),
        dynamic=changes,
        own_decay=_own_decay(run),
        contents=contents.learned(run.cfg, run.contents),
    )
    made.remove_callback(PrinterCallback)
    if made.whole_logits is not None and run.cfg.model.task == "causal_lm":
        run.say(f"  logits of every position are computed: {made.whole_logits}")
    return made


def _own_decay(run: Run) -> dict[str, float]:
    """The head's weight decay, where it is not that of the rest."""
    from . import heads

    decay = run.cfg.model.head.weight_decay
    if decay is None or run.cfg.model.task != "sequence_classification" or not run.cfg.model.head.train:
        return {}
    assert run.attached is not None
    head = tuple(f"{name}." for name in heads.modules(run.model))
    trained = checkpoints.trainable(run.attached.model)  # PEFT puts its own names before the model's
    return {name: decay for name in trained if name.removeprefix("base_model.model.").startswith(head)}


def _of_task(run: Run) -> dict[str, Any]:
    """The loss and the figures that the Trainer gets; a causal model brings its own loss."""
    from . import classification

    if run.cfg.model.task == "causal_lm":
        return {}
    smoothed = partial(classification.loss, smoothing=run.cfg.train.get("label_smoothing_factor") or 0.0)
    return {"compute_loss_func": smoothed, "compute_metrics": classification.trainer_metrics(run.data.space)}


def _loop(run: Run, trainer: Any, checkpoint: Path | None) -> list[Result]:
    if checkpoint is not None:
        run.note(f"  resumed from {checkpoint.name}")
    with run.request.deferring(), _out_of_memory(run), engine.lean_linears(run.cfg.deepspeed, run.ranks.world):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.warm_start:
        run.note(f"  warm start: {trainer.warm_start}; Adam's moments were not taken over and started at zero")
    return _kept(trainer.state.log_history)


def _shares(run: Run, trainer: Any) -> Result:
    """Bytes of optimizer state and of gradients on the rank that has most of them; frozen weights have neither."""
    assert run.attached is not None
    if trainer.optimizer is None:  # nothing was left to train
        return {}
    scalars, state = engine.optimizer_share(trainer.optimizer)
    sharded = engine.is_enabled(run.cfg.deepspeed) and engine.zero_stage(run.cfg.deepspeed) >= 2
    size = max(p.element_size() for p in checkpoints.trainable(run.attached.model).values())
    gradients = size * (scalars if sharded else run.attached.trainable)
    state, gradients, scalars = (max(run.ranks.gather(count)) for count in (state, gradients, scalars))
    run.say(
        f"  optimizer {state:,} bytes and gradients {gradients:,} bytes a rank, of {scalars:,} of {run.attached.trainable:,}"
        " trained scalars"
    )
    return {"optimizer_bytes": state, "gradient_bytes": gradients}


@contextmanager
def _out_of_memory(run: Run) -> Iterator[None]:
    """What went out of memory says which micro-batch the plan holds possible."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.is_shortage(error):
            raise
        from . import planning

        try:
            advice = planning.advice(run.cfg, run.ranks.world, memory.total_bytes())
        except UserError:  # a method or a model that cannot be planned
            advice = "a smaller train.per_device_train_batch_size"
        raise UserError(f"training ran out of memory; by the plan, set {advice}") from error


def _kept(log: list[Result]) -> list[Result]:
    """Of an optimizer step that fp16 skipped there is no gradient's norm: JSON knows no infinity."""
    rows = [{key: row[key] for key in KEPT if key in row} for row in log]
    for row in rows:
        if not math.isfinite(row.get("grad_norm") or 0.0):
            del row["grad_norm"]
    return [row for row in rows if "loss" in row or "eval_loss" in row]


def _require_finite(run: Run) -> None:
    """UserError for values that went wrong after the last log, or in an earlier try of this run."""
    assert run.attached is not None
    bad = next((n for n, p in checkpoints.trainable(run.attached.model).items() if not _is_finite(p)), None)
    if bad is not None:
        raise UserError(
            f"{bad} is not finite after training, so nothing is saved; in another output_dir, lower train.learning_rate,"
            " set train.max_grad_norm, or train in float32 (model.dtype=float32)"
        )


def _is_finite(parameter: torch.Tensor) -> bool:
    with whole([parameter]):
        return bool(torch.isfinite(parameter).all())


def _same_on_all_ranks(run: Run) -> str:
    """A hash of all that was trained; each rank must have the same."""
    assert run.attached is not None
    found = hashlib.sha256()
    for name, parameter in checkpoints.trainable(run.attached.model).items():
        found.update(name.encode())
        with whole([parameter]):
            found.update(_bytes(parameter))
    tuner = run.attached.tuner
    if tuner is not None:
        for name in tuner.parked:
            for part in union(tuner, name):
                found.update(_bytes(part))
    digests = run.ranks.gather(found.hexdigest())
    assert len(set(digests)) == 1, f"ranks ended with different values: {digests}"
    return digests[0]


def _bytes(tensor: torch.Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return raw
