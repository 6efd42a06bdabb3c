"""find_mask: exact k, memory limits that change no bit, batches of any kind, metrics of one's own, one-line errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pico
import speft_core as sc
from speft_core.saliency.memory import plan_groups
from speft_core.targets import base_parameters

METRICS = sorted(set(sc.METRICS) - {"random", "grasp"})


def batches_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [pico.batch(model, rows=rows, length=length, seed=rows) for rows, length in [(3, 8), (3, 6), (1, 5)]]


@pytest.mark.parametrize("metric", METRICS)
def test_no_memory_limit_changes_a_bit(metric: str, pico_model: Any) -> None:
    batches = batches_of(pico_model)
    for scope, limit in [("global", 1 if metric == "gradient" else 5000), ("local", 5000)]:
        free = sc.find_mask(pico_model, batches, metric, sc.Budget(k=40), scope=scope)
        assert free.nnz == 40
        limited = sc.find_mask(pico_model, iter(batches), metric, sc.Budget(k=40), scope=scope, memory_limit=limit)
        assert limited == free
        assert limited.made == free.made


KINDS: dict[str, dict[str, Any]] = {
    "entries": {}, "blocks": {"structure": "blocks:2"}, "bounds": {"min_per_layer": 2, "max_per_layer": 0.2},
}  # fmt: skip


@functools.cache
def mask_of(metric: str, scope: str, kind: str, limit: int | None = None) -> sc.SparsityMask:
    model = pico.llama()
    return sc.find_mask(model, batches_of(model)[1:], metric, sc.Budget(k=120), scope=scope, memory_limit=limit, **KINDS[kind])


@settings(max_examples=25)
@given(
    limit=st.integers(1, 60_000),
    metric=st.sampled_from(["gradient", "snip", "fisher"]),
    choice=st.sampled_from([("global", "entries"), ("global", "blocks"), ("global", "bounds"), ("local", "entries"), ("local", "blocks")]),
)
def test_any_memory_limit_gives_the_same_mask(limit: int, metric: str, choice: tuple[str, str]) -> None:
    """Floors, caps and structures too: the choice goes over groups of targets and must not see them."""
    limited, free = mask_of(metric, *choice, limit), mask_of(metric, *choice)
    assert limited == free and limited.made == free.made and free.nnz > 0


def test_groups_respect_the_limit() -> None:
    model = pico.llama()
    names = list(base_parameters(model))
    assert [list(g) for g in plan_groups(model, names, None)] == [names]
    groups = plan_groups(model, names, 5000)
    assert len(groups) > 2
    assert [n for g in groups for n in g] == names
    sizes = {n: 4 * p.numel() for n, p in base_parameters(model).items()}
    assert all(sum(sizes[n] for n in g) <= 5000 or len(g) == 1 for g in groups)


def test_a_generator_is_read_once_and_let_go() -> None:
    model, alive = pico.llama(), []

    def stream() -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches_of(model):
            alive.append(1)
            yield batch

    assert sc.find_mask(model, stream(), budget=sc.Budget(k=9)) == sc.find_mask(model, batches_of(model), budget=sc.Budget(k=9))
    assert len(alive) == 3


def test_a_loader_that_shuffles_gives_every_group_the_same_examples() -> None:
    model = pico.llama()

    class Shuffling:
        turns = 0

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            self.turns += 1
            yield from batches_of(model)[:: -1 if self.turns % 2 else 1]

    expected = sc.find_mask(model, Shuffling(), budget=sc.Budget(k=30))
    assert sc.find_mask(model, Shuffling(), budget=sc.Budget(k=30), memory_limit=1) == expected


@pytest.mark.parametrize("k", [1, 2, "all"])
def test_exactly_k_even_when_all_scores_are_equal(k: Any) -> None:
    model = pico.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    pool = sum(p.numel() for n, p in model.named_parameters() if "q_proj" in n)
    wanted = pool if k == "all" else k
    mask = sc.find_mask(model, batches_of(model), budget=sc.Budget(k=wanted), targets=["q_proj"])
    assert mask.nnz == wanted
    first = next(iter(mask.indices.values()))
    assert first.tolist() == list(range(min(wanted, first.numel())))


def test_the_model_is_left_as_it_was(pico_model: Any) -> None:
    next(pico_model.parameters()).requires_grad_(False)
    pico_model.train()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in pico_model.named_parameters()}
    for metric in sc.METRICS:
        sc.find_mask(pico_model, batches_of(pico_model), metric, sc.Budget(k=5))
    for name, parameter in pico_model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert all(m.training and "forward" not in m.__dict__ for m in pico_model.modules())


def test_scores_of_bf16_weights_are_summed_in_fp32() -> None:
    model = pico.llama(dtype=torch.bfloat16)
    one = pico.batch(model, rows=1)
    scores = sc.saliency_scores(model, [one] * 300)
    alone = sc.saliency_scores(model, [one])
    for name, score in scores.items():
        assert score.dtype == torch.float32
        # 300 additions in bf16 would stop growing at 256 terms; in fp32 the mean is that of one batch.
        assert torch.allclose(score, alone[name], rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize(
    ("metric", "options"),
    [("gradient", {}), ("magnitude", {}), ("snip", {}), ("synflow", {}), ("grasp", {"hessian": "exact"}), ("grasp", {"hessian": "finite"})],
)
def test_a_model_with_a_tuner_is_scored_as_it_has_become(metric: str, options: dict[str, str]) -> None:
    """Also where no forward comes before the weights are read, and where the pass moves the weights itself."""
    model = pico.llama()
    tuner = sc.attach(model, sc.find_mask(model, batches_of(model), budget=sc.Budget(density=0.05)))
    for values in tuner.values.values():
        values.data.normal_(0, 0.1)
    scores = sc.saliency_scores(model, batches_of(model), metric, options=options)
    tuner.sync()
    plain = pico.llama()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(base_parameters(model)[name])
    expected = sc.saliency_scores(plain, batches_of(model), metric, options=options)
    assert all(torch.equal(s, expected[n]) for n, s in scores.items())
    for values in tuner.values.values():
        values.data.normal_(0, 0.1)
    mask = sc.find_mask(model, batches_of(model), metric, sc.Budget(k=60), options=options)
    tuner.sync()
    again = sc.find_mask(model, batches_of(model), metric, sc.Budget(k=60), options=options)
    assert all(torch.equal(mask.indices[n], again.indices[n]) for n in mask.names)
    loss = model(**pico.batch(model)).loss
    loss.backward()
    assert all(v.grad is not None for v in tuner.values.values())


def test_metrics_of_ones_own() -> None:
    model = pico.llama()
    batches, budget = batches_of(model), sc.Budget(k=25)
    expected = sc.find_mask(model, batches, "snip", budget)
    assert sc.find_mask(model, batches, lambda w, g: (w * g).abs(), budget) == expected
    assert sc.find_mask(model, metric=sc.saliency_scores(model, batches, "snip"), budget=budget) == expected
    sc.register_metric("mine", lambda w, g: (w * g).abs())
    try:
        named = sc.find_mask(model, batches, "mine", budget)
        assert named == expected
        assert named.made["metric"] == "mine"
        with pytest.raises(sc.UserError, match="exists already"):
            sc.register_metric("mine", lambda w, g: g)
    finally:
        del sc.METRICS["mine"]
    with pytest.raises(sc.UserError, match="Did you mean 'gradient'"):
        sc.register_metric("other", lambda w, g: g, statistic="gradeint")


def test_floors_and_caps_reach_the_mask() -> None:
    model = pico.llama()
    mask = sc.find_mask(model, batches_of(model), budget=sc.Budget(k=200), min_per_layer=5, max_per_layer=0.2)
    assert mask.nnz == 200
    for name, indices in mask.indices.items():
        assert 5 <= indices.numel() <= round(0.2 * math.prod(mask.shapes[name])), name


def nan_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss * float("nan")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"metric": "gradeint"}, "Did you mean 'gradient'"),
        ({"scope": "layer"}, "scope must be one of global, local"),
        ({"targets": ["q_porj"]}, "matches no parameter"),
        ({"budget": sc.Budget(k=10**9)}, "must fit the targets"),
        ({"batches": []}, "at least one calibration batch"),
        ({"batches": {"input_ids": torch.ones(1, 2)}}, "got one batch; put it in a list"),
        ({"loss_fn": nan_loss}, "batch 0 gives nan"),
        ({"loss_fn": lambda model, batch: torch.ones(())}, "does not depend on the targets"),
        ({"structure": "row"}, "structure must be entries, rows"),
        ({"metric": "random", "structure": "rows"}, "takes no structure"),
        ({"metric": "random", "random_mode": "fair"}, "exact or bernoulli"),
        ({"min_per_layer": 1.5}, r"share in \[0.0, 1.0\]"),
        ({"min_per_layer": 100}, "allow between"),
        ({"min_per_layer": 1, "scope": "local"}, "need scope global"),
        ({"min_per_layer": 1, "structure": "rows"}, "need structure entries"),
        ({"options": {"sing": 1}}, "options of gradient are none"),
        ({"metric": "grasp", "options": {"sing": 1}}, "Did you mean 'sign'"),
        ({"metric": "grasp", "options": {"sign": 2}}, "sign must be -1 or 1"),
        ({"metric": {"nowhere": torch.ones(1)}}, "given scores need"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: dict[str, Any], rule: str) -> None:
    model = pico.llama()
    call = {"batches": batches_of(model), "budget": sc.Budget(k=20), **arguments}
    with pytest.raises(sc.UserError, match=rule) as caught:
        sc.find_mask(model, **call)
    assert "\n" not in str(caught.value)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = pico.llama()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        base_parameters(model)[name].view(-1)[3] = math.inf
    with pytest.raises(sc.UserError, match=name):
        sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=3))
