"""Combinations of settings that would run and be wrong without saying so, each with the reason and what to do instead.

A rule is a row: when it holds, the run is refused. Most were found by comparing losses and weights with a plain run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from speft_core.errors import UserError

from . import engine
from .config import RunConfig, batch_plan


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the rules look at."""

    method: str
    dtype: str  #: of the weights; "auto" until the model is loaded, and then the rules are asked again
    deepspeed: bool
    stage: int
    half: str | None  #: "bf16" or "fp16" of the train section
    raw: dict[str, Any]  #: the DeepSpeed config
    train: dict[str, Any]
    changes_mask: bool = False
    head_decay: bool = False  #: the head has a weight decay of its own
    shards: bool = False  #: no rank holds the whole model
    metric: str = ""  #: of the mask that is to be found, if one is


# The half precisions of the train section, and the dtype that each casts weights to.
HALVES = {"bf16": "bfloat16", "fp16": "float16"}
# Keys of zero_optimization under which gathered weights are not the ones that were partitioned.
QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def _needs_whole(metric: str) -> bool:
    from speft_core.saliency.metrics import METRICS

    return metric in METRICS and METRICS[metric].source.needs_whole


Rule = tuple[Callable[[Setup], bool], str]

RULES: tuple[Rule, ...] = (
    (
        lambda s: s.deepspeed and s.stage == 3 and s.half is not None,
        "train.bf16 and train.fp16 at deepspeed.zero_stage 3 cast the base weights and the values for good; set"
        " model.dtype=bfloat16 and leave them false: weights in bfloat16, values in float32",
    ),
    (
        lambda s: s.deepspeed and s.stage == 3 and any(s.raw.get("zero_optimization", {}).get(key) for key in QUANTISED),
        f"deepspeed.config: {', '.join(QUANTISED)} round the weights when they are gathered, so that base + values would be lost;"
        " remove them",
    ),
    (
        lambda s: s.shards and _needs_whole(s.metric),
        "adapter.metric grasp and synflow need every weight at once, which no rank has at deepspeed.zero_stage 3; find this mask with"
        " `speft-train mask` at stage 0 to 2 and set adapter.mask to its file",
    ),
    (
        lambda s: s.deepspeed and s.stage == 0 and s.half is not None,
        "train.bf16 and train.fp16 need deepspeed.zero_stage 1 or 2: at stage 0 DeepSpeed scales the updates wrongly"
        " (by 0.744 in the first step) and says nothing; set model.dtype=bfloat16 instead",
    ),
    (
        lambda s: s.half == "fp16" and s.method == "sparse",
        "train.fp16 cannot train sparse values: they would be cast to float16; set model.dtype and leave train.fp16 false",
    ),
    (
        lambda s: s.half == "bf16" and s.method == "sparse" and not s.deepspeed,
        "train.bf16 computes float32 weights in bfloat16 anew in each forward; for method sparse set"
        " model.dtype=bfloat16 and leave train.bf16 false: weights in bfloat16, values in float32",
    ),
    (
        lambda s: s.deepspeed and s.half is not None and s.method != "full" and s.dtype not in ("auto", HALVES[s.half]),
        "train.bf16 and train.fp16 on DeepSpeed cast the base weights for good: what is measured before training and after it would have"
        " different bases, and detaching could not restore the weights; set model.dtype=bfloat16 (train.bf16 can stay false: what is"
        " trained is then kept in float32)",
    ),
    (
        lambda s: s.deepspeed and s.stage == 0 and engine.offload_device(s.raw["zero_optimization"], "offload_optimizer") is not None,
        "offload_optimizer needs deepspeed.zero_stage 1, 2 or 3; at stage 0 DeepSpeed offloads nothing and does not say so",
    ),
    (
        lambda s: s.deepspeed and "optimizer" in s.raw and s.train.get("optim") is not None,
        "train.optim and an optimizer block in deepspeed.config name two optimizers; keep one",
    ),
    (
        lambda s: s.head_decay and "optimizer" in s.raw,
        "model.head.weight_decay cannot reach the optimizer block of deepspeed.config, which has one weight decay; remove one of them",
    ),
    (
        lambda s: bool(s.raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) != 1),
        "deepspeed.config: zero_hpz_partition_size is untested with sparse values; remove it",
    ),
    (
        lambda s: any(engine.offload_device(s.raw.get("zero_optimization", {}), key) == "nvme" for key in engine.OFFLOADS),
        "deepspeed.config: offload to nvme is untested with sparse values; allowed: cpu, none",
    ),
    (
        lambda s: bool(s.train.get("save_only_model")),
        "train.save_only_model leaves checkpoints from which no run can resume; remove it (no frozen weight is saved"
        " in any case)",
    ),
    (
        lambda s: bool(s.train.get("fp16_full_eval") or s.train.get("bf16_full_eval")),
        "train.fp16_full_eval and bf16_full_eval cast the base weights for good; set model.dtype instead",
    ),
    (
        lambda s: s.changes_mask and s.deepspeed and s.stage in (1, 2, 3),
        "adapter.dynamic needs deepspeed.zero_stage 0: the others lay the values into flat buffers, whose parts cannot"
        " change size with the mask; allowed: 0, where each rank holds the optimizer of k scalars",
    ),
    (
        lambda s: s.method == "sparse" and bool(s.train.get("optim_target_modules")),
        "train.optim_target_modules picks whole weights, of which method sparse trains none; remove it",
    ),
)


def check_run(cfg: RunConfig) -> None:
    """`check`, and what stands against training and measuring, as far as the config and the launched processes tell: before
    anything is loaded or written.
    """
    from . import measure  # brings torch: not before the config has been read

    check(cfg)
    batch_plan(cfg, engine.launched_ranks()[1])
    if cfg.train.get("eval_strategy", "no") != "no" and cfg.data.validation is None and not cfg.data.validation_from_train:
        raise UserError("train.eval_strategy needs data.validation or data.validation_from_train; neither is set")
    measure.check_config(cfg)


def check(cfg: RunConfig, dtype: str | None = None) -> None:
    """Raise a UserError with every reason for which this run is refused."""
    on = engine.is_enabled(cfg.deepspeed)
    raw = engine.settings(cfg.deepspeed) if on else {}
    half = next((name for name in HALVES if cfg.train.get(name)), None)
    if half is None:
        half = next((name for name in HALVES if raw.get(name, {}).get("enabled") is True), None)
    setup = Setup(
        method=cfg.adapter.method,
        dtype=dtype or cfg.model.dtype,
        deepspeed=on,
        stage=int(raw.get("zero_optimization", {}).get("stage", 0)),
        half=half,
        raw=raw,
        train=dict(cfg.train),
        changes_mask=cfg.adapter.dynamic.interval is not None,
        head_decay=cfg.model.head.weight_decay is not None,
        shards=engine.shards_weights(cfg.deepspeed, engine.launched_ranks()[1]),
        metric=cfg.adapter.metric if cfg.adapter.method == "sparse" and not cfg.adapter.mask else "",
    )
    reasons = [reason for holds, reason in RULES if holds(setup)] + disagreements(setup.train, raw)
    if reasons:
        raise UserError("; ".join(reasons))


def check_schedule(cfg: RunConfig, examples: int, world: int) -> None:
    """UserError where a DeepSpeed config says otherwise than the train section on so many training examples."""
    from .sampler import steps_in_all

    if not engine.is_enabled(cfg.deepspeed):
        return
    said, (per_device, accumulation) = {**_defaults(), **cfg.train}, batch_plan(cfg, world)
    steps = steps_in_all(examples, per_device * accumulation * world, said["max_steps"], said["num_train_epochs"])
    reasons = disagreements(cfg.train, engine.settings(cfg.deepspeed), steps)
    if reasons:
        raise UserError("; ".join(reasons))


def disagreements(train: Mapping[str, Any], raw: Mapping[str, Any], steps: int | None = None) -> list[str]:
    """Where a DeepSpeed config says otherwise than the train section: transformers compares the two as well, but only when training
    starts, after all that comes before. steps: of the whole run; until the data tell them, what follows from them is taken as it is.
    """
    given = {key: value for key in COMPARED if (value := _reach(raw, key)) not in (None, "auto")}
    if not given:
        return []
    said = {**_defaults(), **train}
    by_data = said["max_steps"] <= 0
    if by_data and steps is not None:
        said["max_steps"] = steps
    found = []
    for key, value in given.items():
        fields_of, expected_of = COMPARED[key]
        names, expected = " and ".join(f"train.{name}" for name in fields_of), expected_of(said)
        if by_data and "max_steps" in fields_of:
            names = "train.num_train_epochs and the size of the training data"
        if expected is not None and value != expected:
            found.append(
                f"deepspeed.config: {key} is {value!r}, but by {names} it is {expected!r}; set {key} to auto, or both to one value"
            )
    return found


def _reach(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


@functools.cache
def _defaults() -> dict[str, Any]:
    """What TrainingArguments takes where the train section says nothing."""
    from transformers import TrainingArguments

    return {f.name: f.default for f in fields(TrainingArguments)}


def _total(train: Mapping[str, Any]) -> int | None:
    """Steps in all, as far as the train section alone tells."""
    return int(train["max_steps"]) if train["max_steps"] > 0 else None


def _warmup(train: Mapping[str, Any]) -> int | None:
    """Steps of warming up: a share of all below 1; at least one, as transformers has it."""
    steps, total = train["warmup_steps"], _total(train)
    if 0 < steps < 1:
        return None if total is None else max(1, math.ceil(total * steps))
    return max(1, int(steps))


# Key of a DeepSpeed config -> the fields of the train section that it follows from, and its value by them (None: the data will tell).
COMPARED: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    "bf16.enabled": (("bf16",), lambda t: bool(t["bf16"])),
    "fp16.enabled": (("fp16",), lambda t: bool(t["fp16"])),
    "optimizer.params.lr": (("learning_rate",), lambda t: t["learning_rate"]),
    "optimizer.params.betas": (("adam_beta1", "adam_beta2"), lambda t: [t["adam_beta1"], t["adam_beta2"]]),
    "optimizer.params.eps": (("adam_epsilon",), lambda t: t["adam_epsilon"]),
    "optimizer.params.weight_decay": (("weight_decay",), lambda t: t["weight_decay"]),
    "scheduler.params.warmup_max_lr": (("learning_rate",), lambda t: t["learning_rate"]),
    "scheduler.params.warmup_num_steps": (("warmup_steps",), _warmup),
    "scheduler.params.total_num_steps": (("max_steps",), _total),
}
