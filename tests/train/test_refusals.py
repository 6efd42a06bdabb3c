"""Settings that would be wrong without saying so are refused, each with its reason; their sound neighbours are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from speft_core import UserError
from speft_train import config, refusals


def made(dtype: str = "float32", method: str = "sparse", deepspeed: dict[str, Any] | None = None, head: Any = None, **train: Any) -> Any:
    return config.from_mapping(
        {
            "output_dir": "out",
            "model": {"name": "m", "dtype": dtype, "head": head},
            "data": {"train": "d.jsonl"},
            "adapter": {"method": method, "budget": {"k": 10}},
            "train": train,
            "deepspeed": {"enabled": deepspeed is not None, **(deepspeed or {})},
        }
    )


REFUSED = [
    (dict(deepspeed={"zero_stage": 3}, dtype="bfloat16", bf16=True), "zero_stage 3 cast the base weights and the values"),
    (dict(deepspeed={"config": {"zero_optimization": {"stage": 3}}}, method="lora", bf16=True), "zero_stage 3 cast the base"),
    (
        dict(deepspeed={"zero_stage": 3, "config": {"zero_optimization": {"zero_quantized_weights": True}}}),
        "zero_quantized_weights, .* round the weights when they are gathered",
    ),
    (dict(deepspeed={"zero_stage": 0}, dtype="bfloat16", bf16=True), "stage 0 DeepSpeed scales the updates wrongly"),
    (dict(deepspeed={"zero_stage": 0}, method="lora", bf16=True), "stage 0 DeepSpeed scales the updates wrongly"),
    (dict(deepspeed={"config": {"bf16": {"enabled": True}}}), "stage 0 DeepSpeed scales the updates wrongly"),
    (dict(deepspeed={"zero_stage": 2}, fp16=True), "train.fp16 cannot train sparse values"),
    (dict(bf16=True), "train.bf16 computes float32 weights in bfloat16 anew"),
    *(
        (dict(deepspeed={"zero_stage": stage}, method=method, bf16=True), "DeepSpeed cast the base weights for good")
        for method in ("sparse", "lora", "pissa", "dora", "head", "bitfit")
        for stage in (1, 2)
    ),
    (dict(deepspeed={"zero_stage": 2}, method="lora", fp16=True), "DeepSpeed cast the base weights for good"),
    (dict(deepspeed={"offload_optimizer": "cpu", "config": {"steps_per_print": 5}}), "at stage 0 DeepSpeed offloads nothing"),
    (dict(deepspeed={"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}), "at stage 0 DeepSpeed offloads nothing"),
    (dict(save_only_model=True), "from which no run can resume"),
    (dict(bf16_full_eval=True), "cast the base weights for good"),
    (
        dict(deepspeed={"zero_stage": 2, "config": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}),
        "offload to nvme is untested",
    ),
    (dict(deepspeed={"config": {"zero_optimization": {"zero_hpz_partition_size": 2}}}), "zero_hpz_partition_size"),
    (dict(deepspeed={"config": {"optimizer": {"type": "AdamW"}}}, optim="adamw_torch"), "name two optimizers"),
    (dict(deepspeed={"config": {"optimizer": {"type": "AdamW"}}}, head={"weight_decay": 0.0}), "model.head.weight_decay"),
]
ALLOWED = [
    dict(),
    dict(dtype="bfloat16"),
    dict(method="lora", bf16=True),
    dict(method="full", bf16=True),
    *(dict(deepspeed={"zero_stage": stage}) for stage in (0, 1, 2, 3)),
    *(dict(deepspeed={"zero_stage": stage}, dtype="bfloat16") for stage in (0, 1, 2, 3)),
    dict(deepspeed={"zero_stage": 2}, dtype="bfloat16", bf16=True),
    dict(deepspeed={"zero_stage": 2}, method="full", bf16=True),
    dict(deepspeed={"zero_stage": 2}, method="lora", dtype="bfloat16", bf16=True),
    dict(deepspeed={"zero_stage": 1}, method="head", dtype="float16", fp16=True),
    dict(deepspeed={"config": {"zero_optimization": {"stage": 1}}, "offload_optimizer": "cpu"}),
    dict(deepspeed={"zero_stage": 3, "config": {"zero_optimization": {"offload_param": None}}}),
    dict(deepspeed={"zero_stage": 2, "offload_optimizer": "cpu"}),
    dict(deepspeed={"zero_stage": 2}, head={"weight_decay": 0.0}),
    dict(deepspeed={"config": {"optimizer": {"type": "AdamW"}}}),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        refusals.check(made(**settings))


@pytest.mark.parametrize("settings", ALLOWED)
def test_allowed(settings: dict[str, Any]) -> None:
    refusals.check(made(**settings))


def test_all_reasons_come_at_once_in_one_line() -> None:
    with pytest.raises(UserError) as error:
        refusals.check(made(bf16=True, save_only_model=True))
    assert "train.bf16" in str(error.value) and "save_only_model" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["sparse", "lora", "pissa", "dora", "head", "bitfit"])
def test_the_dtype_of_the_loaded_model_counts(method: str) -> None:
    """Until it is known nothing is said: the checkpoint may have the right one."""
    cfg = made(dtype="auto", method=method, deepspeed={"zero_stage": 2}, bf16=True)
    refusals.check(cfg)
    refusals.check(cfg, "bfloat16")
    with pytest.raises(UserError, match="for good"):
        refusals.check(cfg, "float32")


@pytest.mark.parametrize("metric", ["grasp", "synflow"])
def test_metrics_of_whole_weights_are_refused_where_ranks_hold_shards(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank nothing is in shards; a mask that is there already needs no metric."""
    cfg = made(deepspeed={"zero_stage": 3})
    cfg = replace(cfg, adapter=replace(cfg.adapter, metric=metric))
    monkeypatch.setenv("WORLD_SIZE", "1")
    refusals.check(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="`speft-train mask` at stage 0 to 2 and set adapter.mask"):
        refusals.check(cfg)
    refusals.check(replace(cfg, adapter=replace(cfg.adapter, mask="mask.safetensors")))
    refusals.check(replace(cfg, deepspeed=replace(cfg.deepspeed, zero_stage=2)))


def test_an_optimizer_is_not_offloaded_at_stage_0_in_a_plain_process_either() -> None:
    with pytest.raises(UserError, match="deepspeed.offload_optimizer: cpu needs zero_stage 1, 2 or 3"):
        made(deepspeed={"enabled": False, "offload_optimizer": "cpu"})


ADAM = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
AS_ADAM = dict(learning_rate=1e-3, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.1)
WARMUP = {"warmup_max_lr": 1e-3, "warmup_num_steps": 3, "total_num_steps": 30}


def raw(**sections: Any) -> dict[str, Any]:
    return {"zero_stage": 2, "config": sections}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(deepspeed=raw(bf16={"enabled": True}), dtype="bfloat16"),
         "bf16.enabled is True, but by train.bf16 it is False; set bf16.enabled to auto"),
        (dict(deepspeed=raw(bf16={"enabled": False}), dtype="bfloat16", bf16=True), "bf16.enabled is False, but by train.bf16 it is True"),
        (dict(deepspeed=raw(optimizer={"params": {"lr": 1e-3}})), "optimizer.params.lr is 0.001, but by train.learning_rate it is 5e-05"),
        (dict(deepspeed=raw(optimizer={"params": ADAM}), **{**AS_ADAM, "adam_beta2": 0.9}),
         r"optimizer.params.betas is \[0.9, 0.95\], but by train.adam_beta1 and train.adam_beta2 it is \[0.9, 0.9\]"),
        (dict(deepspeed=raw(optimizer={"params": ADAM}), **{**AS_ADAM, "adam_epsilon": 1e-8}), "optimizer.params.eps is 1e-07"),
        (dict(deepspeed=raw(optimizer={"params": ADAM}), **{**AS_ADAM, "weight_decay": 0.0}), "optimizer.params.weight_decay is 0.1"),
        (dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=2e-3, warmup_steps=3, max_steps=30), "warmup_max_lr is 0.001"),
        (dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=1e-3, warmup_steps=0.2, max_steps=30),
         "warmup_num_steps is 3, .* it is 6"),
        (dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=1e-3, warmup_steps=3, max_steps=20),
         "total_num_steps is 30, .* it is 20"),
    ],
)  # fmt: skip
def test_a_deepspeed_config_that_says_otherwise_than_the_train_section(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^deepspeed.config: (scheduler.params.)?{told}") as error:
        refusals.check(made(**settings))
    assert "\n" not in str(error.value) and "; deepspeed.config" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        dict(deepspeed=raw(bf16={"enabled": True}), dtype="bfloat16", bf16=True),
        dict(deepspeed=raw(bf16={"enabled": "auto"}, optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0}})),
        dict(deepspeed=raw(optimizer={"params": ADAM}), **AS_ADAM),
        dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=1e-3, warmup_steps=0.1, max_steps=30),
        dict(deepspeed=raw(scheduler={"params": {"warmup_num_steps": 1, "total_num_steps": "auto"}})),
        dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=1e-3, warmup_steps=3),
        dict(deepspeed=raw(scheduler={"params": WARMUP}), learning_rate=1e-3, warmup_steps=0.2, num_train_epochs=3),
        dict(deepspeed=raw(scheduler=None, optimizer=None, bf16=None, zero_optimization=None)),
        dict(deepspeed=raw(optimizer=None), head={"weight_decay": 0.0}, optim="adamw_torch"),
    ],
)
def test_a_deepspeed_config_that_says_the_same_is_taken(settings: dict[str, Any]) -> None:
    refusals.check(made(**settings))
