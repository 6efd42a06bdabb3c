"""On the bundled SmolLM2-135M: no memory limit changes a bit of the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import speft_core as sc

pytestmark = pytest.mark.real
MIB = 1 << 20


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model in fp32, and two batches of word problems, unequal in size and length."""
    from speft_train import config, data, models

    cfg = config.from_mapping(
        {
            "output_dir": "unused", "model": {"name": "bundled:smollm2-135m", "dtype": "float32"},
            "data": {"train": "bundled:word-problems", "train_size": 5}, "adapter": {"budget": {"k": 1}},
        }
    )  # fmt: skip
    model, tokenizer = models.load_model(cfg)
    bundle = data.build(cfg, tokenizer)
    rows = [bundle.train[i] for i in range(5)]
    collate = bundle.collator(tokenizer)
    return model, [collate(rows[:3]), collate(rows[3:])]


@pytest.mark.parametrize(("metric", "limits"), [("gradient", (200 * MIB, 64 * MIB)), ("fisher", (200 * MIB,))])
def test_any_memory_limit_gives_the_same_mask(
    smollm2: tuple[Any, list[dict[str, torch.Tensor]]], metric: str, limits: tuple[int, ...]
) -> None:
    """425 MB of accumulators, in three and in seven passes."""
    model, batches = smollm2
    budget = sc.Budget(density=0.005, of="targets")
    free = sc.find_mask(model, batches, metric, budget)
    assert free.nnz == budget.resolve(model, free.names) > 500_000
    for limit in limits:
        assert sc.find_mask(model, batches, metric, budget, memory_limit=limit) == free, limit
