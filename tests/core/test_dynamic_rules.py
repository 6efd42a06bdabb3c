"""Masks that change: what they keep to of the first mask's rules, and what starts afresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pico
import speft_core as sc


def changing(mask: sc.SparsityMask, model: nn.Module, **settings: Any) -> sc.DynamicMask:
    tuner = sc.attach(model, mask, keep_empty=True)
    settings.setdefault("batches", lambda n: [pico.batch(model, seed=n)])
    return sc.DynamicMask(tuner=tuner, interval=1, **settings)


@pytest.mark.parametrize(
    ("found", "settings", "told"),
    [
        ({"structure": "rows"}, {"find_options": {"structure": "rows"}}, "structure rows"),
        ({"max_per_layer": 9}, {"find_options": {"max_per_layer": 9}}, "max_per_layer 9"),
        ({"scope": "local"}, {"scope": "local"}, "scope local"),
        ({"scope": "local"}, {}, "scope local"),
    ],
)
def test_grow_and_drop_takes_no_rule_that_it_would_break(found: dict[str, Any], settings: dict[str, Any], told: str) -> None:
    model = pico.llama()
    mask = sc.find_mask(model, [pico.batch(model)], budget=sc.Budget(k=100), **found)
    with pytest.raises(sc.UserError, match=f"grow_and_drop exchanges single entries over all targets, so that {told} would not last"):
        changing(mask, model, policy="grow_and_drop", **settings)
    model._speft_tuner.detach()  # type: ignore[operator, union-attr]
    changing(mask, model, **settings)


def test_a_structure_may_fill_its_budget_again() -> None:
    """The first mask had no room for its last unit; the next one may hold other units, larger ones too."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Linear(2, 12, bias=False)).float()
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    scores["1.weight"][0] = 1.0  # a row of 4
    budget = sc.Budget(k=9)
    mask = sc.find_mask(model, metric={**scores, "0.weight": scores["0.weight"] + 1e-3}, budget=budget, structure="rows")
    first = mask.nnz
    other = {**scores, "0.weight": torch.ones(4, 8)}
    dynamic = changing(mask, model, metric=other, find_options={"structure": "rows"}, batches=lambda n: [])
    dynamic.change()
    assert first < 8 <= dynamic.tuner.mask.nnz <= 9
    assert dynamic.tuner.mask.indices["0.weight"].numel() == 8


@pytest.mark.parametrize("state", ["clear", "keep"])
def test_dense_parts_start_afresh_too(state: str) -> None:
    model = pico.llama()
    mask = sc.find_mask(model, [pico.batch(model)], budget=sc.Budget(k=60))
    tuner = sc.attach(model, mask, ["model.norm"], keep_empty=True)
    dynamic = sc.DynamicMask(tuner=tuner, batches=lambda n: [pico.batch(model, seed=n)], interval=1, optimizer_state=state)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    model(**pico.batch(model)).loss.backward()
    optimizer.step()
    norm = tuner.dense["model.norm.weight"]
    assert optimizer.state[norm]
    dynamic.change(optimizer)
    assert (norm in optimizer.state) == (state == "keep")
