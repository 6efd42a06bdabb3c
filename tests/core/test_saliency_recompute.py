"""A pass over a model with activation checkpointing: the same bits, kept from layer inputs alone, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pico
import speft_core as sc
from speft_core.saliency.metrics import METRICS

FAMILIES = [pico.llama, pico.opt, pico.gpt2, pico.bert]
PASSES = [name for name, metric in METRICS.items() if metric.needs_gradient and name not in ("grasp", "synflow")]


def switch(model: Any, word: str) -> None:
    (getattr(model, f"activation_checkpointing_{word}", None) or getattr(model, f"gradient_checkpointing_{word}"))()


def scores(model: Any, metric: str) -> tuple[dict[str, torch.Tensor], int]:
    """The scores, and the bytes that autograd kept outside of recomputed layers."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = sc.saliency_scores(model, [pico.batch(model), pico.batch(model, seed=1)], metric)
    return found, kept


@pytest.mark.parametrize("metric", PASSES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_recomputed_scores_have_the_bits_of_kept_ones(family: Callable[..., Any], metric: str) -> None:
    model = family()
    expected, _ = scores(model, metric)
    switch(model, "enable")
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    found, _ = scores(model, metric)
    assert layers and all("forward" not in layer.__dict__ for layer in layers)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    switch(model, "disable")
    again, _ = scores(model, metric)
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_less_is_kept_and_layers_run_twice() -> None:
    model = pico.llama()
    layer = model.model.layers[0]
    calls: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, plain = scores(model, "gradient")
    assert len(calls) == 2  # batches
    switch(model, "enable")
    _, fewer = scores(model, "gradient")
    assert len(calls) == 2 + 4 and fewer < 0.7 * plain


def test_layers_without_checkpointing_and_other_forwards_stay() -> None:
    model = pico.llama()
    switch(model, "enable")
    first, second = model.model.layers[:2]
    second.gradient_checkpointing = False  # as every_n_layers does
    own = first.forward
    first.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine, calls = first.forward, []
    for number, layer in enumerate((first, second)):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    sc.saliency_scores(model, [pico.batch(model)], "gradient")
    assert sorted(calls) == [0, 0, 1] and first.forward is mine and "forward" not in second.__dict__


def test_a_cache_is_not_written_twice() -> None:
    model = pico.llama()
    model.config.use_cache = True
    expected, _ = scores(model, "gradient")
    switch(model, "enable")
    found, _ = scores(model, "gradient")
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_forwards_come_back_after_an_error() -> None:
    model = pico.llama()
    switch(model, "enable")

    def fails(model: Any, batch: Any) -> torch.Tensor:
        model(**batch)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        sc.saliency_scores(model, [pico.batch(model)], "gradient", loss_fn=fails)
    assert all("forward" not in module.__dict__ for module in model.modules())
