"""What to lower when a stage went out of memory. Of the training loop the plan tells more (training.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from speft_core.errors import UserError

from . import memory
from .config import RunConfig


@contextmanager
def told(cfg: RunConfig, stage: str) -> Iterator[None]:
    """Within it an allocation that fails becomes one line with the stage and what to set."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.is_shortage(error):
            raise
        raise UserError(f"stage {stage} ran out of memory; {advice(cfg, stage)}") from error


def advice(cfg: RunConfig, stage: str) -> str:
    """The settings that a stage's memory follows from, the strongest first, each with its value."""
    if stage in ("base", "evaluate"):
        settings = cfg.evaluate
        lower: dict[str, Any] = {"evaluate.batch_size": settings.batch_size} if settings.batch_size > 1 else {}
        if settings.generation and cfg.model.task == "causal_lm" and cfg.data.template != "multiple_choice":
            lower["evaluate.max_new_tokens"] = settings.max_new_tokens
    elif stage == "mask":
        size, limit = cfg.adapter.calibration_batch_size, cfg.adapter.memory_limit
        lower = {"adapter.calibration_batch_size": size} if size > 1 else {}
        lower["adapter.memory_limit"] = "half of what is free" if limit is None else limit
    elif stage == "train":
        return "lower train.per_device_train_batch_size"
    else:
        return "hold the weights in less: model.dtype=bfloat16, or deepspeed.zero_stage=3 on more GPUs"
    lower["data.max_length"] = cfg.data.max_length
    return "lower " + ", ".join(f"{key} (now {value})" for key, value in lower.items())
