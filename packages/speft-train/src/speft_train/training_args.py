"""From the train section to transformers.TrainingArguments: our defaults, what the user set, what follows from the
rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speft_core.errors import UserError, nearest

from . import engine, refusals, train_args
from .config import RunConfig, batch_plan
from .ranks import Ranks
from .sampler import require_batch

# Where a run differs from TrainingArguments: checkpoints are small, and a long log interval hides a diverging loss.
DEFAULTS: dict[str, Any] = {
    "logging_steps": train_args.LOGGING_STEPS,
    "save_steps": 200,
    "save_total_limit": 2,
    "restore_callback_states_from_checkpoint": True,  # what early stopping has counted
    "disable_tqdm": True,  # so is the progress bar
    "logging_nan_inf_filter": False,  # a loss that is not finite ends the run
    "log_level": "error",
    "log_level_replica": "error",
}
OWN_KEYS = ("global_batch_size", "early_stopping_patience", "disable_tqdm")
OWN_TRACKER = "tensorboard"  # added by the run itself, in a folder of its own


def build(cfg: RunConfig, ranks: Ranks, folder: Path) -> Any:
    """TrainingArguments of this run. UserError where transformers refuses a value."""
    from transformers import TrainingArguments

    with _one_line_errors():
        made = TrainingArguments(**_fields(cfg, ranks.world, folder))
    if made.n_gpu > 1:  # or the Trainer would copy the model to all GPUs (DataParallel), and cut up or enlarge each batch
        made._n_gpu = 1
    return made


def check(cfg: RunConfig, world: int) -> None:
    """UserError for what TrainingArguments refuses. Making them would start devices and DeepSpeed: this stops before."""
    from transformers import TrainingArguments

    _check_trackers(cfg)

    class Passed(Exception):
        pass

    class Checked(TrainingArguments):
        def _validate_args(self) -> None:
            super()._validate_args()
            raise Passed

    try:
        with _one_line_errors():
            Checked(**_fields(cfg, world, Path(cfg.output_dir)))
    except Passed:
        pass


def check_data(cfg: RunConfig, world: int, bundle: Any) -> None:
    """UserError for data that fill no batch, make another schedule than DeepSpeed is given, or leave nothing to validate on where that
    is asked for.
    """
    require_batch(len(bundle.train), global_batch(cfg, world))
    refusals.check_schedule(cfg, len(bundle.train), world)
    if cfg.train.get("eval_strategy", "no") != "no" and bundle.validation is None:
        raise UserError(
            f"train.eval_strategy needs validation examples; every validation example is longer than data.max_length"
            f" ({cfg.data.max_length})"
        )


def _fields(cfg: RunConfig, world: int, folder: Path) -> dict[str, Any]:
    import torch

    per_device, accumulation = batch_plan(cfg, world)
    fields = {**DEFAULTS, **{k: v for k, v in cfg.train.items() if k not in OWN_KEYS}}
    fields.update(
        output_dir=str(folder),
        report_to=[name for name in _trackers(cfg) if name != OWN_TRACKER],
        seed=cfg.seed,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    fields["save_total_limit"] = None  # RunTrainer rotates, see `kept`
    if (steps := train_args.steps_to_best(cfg.train)) is not None:
        fields["save_steps"] = steps
    fields.setdefault("per_device_eval_batch_size", per_device)  # what trains fits; eight long examples of a 7B model may not
    fields.setdefault("use_cpu", not torch.cuda.is_available())
    if fields["use_cpu"]:
        fields.setdefault("dataloader_pin_memory", False)
    if fields.get("activation_checkpointing"):
        # The re-entrant kind gives no gradient when the embeddings are frozen.
        kwargs = dict(fields.get("activation_checkpointing_kwargs") or {})
        fields["activation_checkpointing_kwargs"] = {"use_reentrant": False, **kwargs}
    if engine.is_enabled(cfg.deepspeed):
        fields["deepspeed"] = engine.settings(cfg.deepspeed)
    return fields


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (ValueError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"train: transformers refuses these settings: {text}") from error


def idle_gpus(cfg: RunConfig, world: int) -> str | None:
    """What there is to say where one process runs on a host with several GPUs."""
    import torch

    if world > 1 or cfg.train.get("use_cpu") or not torch.cuda.is_available() or (count := torch.cuda.device_count()) < 2:
        return None
    return (
        f"one process uses one GPU, {count - 1} more stay idle; to use all of them:"
        f" deepspeed --num_gpus {count} packages/speft-train/run.py CONFIG"
    )


def kept(cfg: RunConfig) -> int | None:
    """Checkpoints that stay (`train.save_total_limit`); None for all."""
    limit: int | None = {**DEFAULTS, **cfg.train}["save_total_limit"]
    return limit


def wants_tensorboard(cfg: RunConfig) -> bool:
    """TensorBoard is on unless `train.report_to` leaves it out."""
    return OWN_TRACKER in _trackers(cfg)


def _trackers(cfg: RunConfig) -> list[str]:
    """`train.report_to` as a list; "all" is what transformers finds installed."""
    wanted = cfg.train.get("report_to", OWN_TRACKER)
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    if names == ["all"]:
        from transformers.integrations import get_available_reporting_integrations

        return list(dict.fromkeys([OWN_TRACKER, *get_available_reporting_integrations()]))
    return [] if names == ["none"] else names


def _check_trackers(cfg: RunConfig) -> None:
    """UserError for a tracker that transformers does not know, or that is not installed: it would only tell once the model is loaded."""
    from transformers import integrations

    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    installed = list(dict.fromkeys([OWN_TRACKER, *integrations.get_available_reporting_integrations()]))
    for name in _trackers(cfg):
        if name not in known:
            allowed = f"allowed: all, none, or some of {', '.join(known)}"
            raise UserError(f"train.report_to: {name!r} is no tracker that transformers knows.{nearest(name, known)} {allowed}")
        if name not in installed:
            raise UserError(f"train.report_to: {name} is not installed; installed: {', '.join(installed)}")


def global_batch(cfg: RunConfig, world: int) -> int:
    """Examples of one optimizer step over all processes."""
    per_device, accumulation = batch_plan(cfg, world)
    return per_device * accumulation * world
