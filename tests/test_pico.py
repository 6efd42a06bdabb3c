"""The pico models are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch

import pico


@pytest.mark.parametrize("name", pico.MODELS)
def test_the_same_arguments_give_the_same_bits(name: str) -> None:
    first, second, other = pico.MODELS[name](), pico.MODELS[name](), pico.MODELS[name](seed=1)
    for (key, mine), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_means_one_tensor(name: str, tied: bool) -> None:
    model = pico.MODELS[name](tied=tied)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) is tied


@pytest.mark.parametrize("name", pico.MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_small_and_every_body_weight_gets_a_gradient(name: str, dtype: torch.dtype) -> None:
    model = pico.MODELS[name](dtype=dtype)
    assert sum(p.numel() for p in model.parameters()) < 20_000
    loss = model(**pico.batch(model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
