"""Layers of transformers that compute again in backward, where their own call and its hooks do not come by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import speft_core as sc
from attached import IDS, LABELS, bits, oracle_gradients, same_bits, some_mask, train

CHECKPOINTING = "_gradient_checkpointing_func"  # of transformers


class Layer(GradientCheckpointingLayer):
    """Has parameters of its own, calls `called`, and reads `inner.read` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.called, self.inner = nn.Linear(12, 12), nn.ModuleDict({"read": nn.Linear(12, 12)})

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = torch.tanh(self.called(x)) * torch.tanh(self.gate) + self.bias
        return x + scale * functional.linear(torch.tanh(y), self.inner["read"].weight) * self.gate


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers, self.head = nn.Embedding(31, 12), nn.ModuleList([Layer(), Layer()]), nn.Linear(12, 31)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).requires_grad_()
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)

    def recompute(self, reentrant: bool, seen: list[bool]) -> None:
        def checkpointing(function: Callable[..., Any], *args: Any) -> Any:
            def counting(*given: Any) -> Any:
                seen.append(torch._C._current_graph_task_id() >= 0)
                return function(*given)

            return checkpoint(counting, *args, use_reentrant=reentrant)

        for layer in self.layers:
            layer.gradient_checkpointing = True
            setattr(layer, CHECKPOINTING, checkpointing)


def loss_of(model: nn.Module) -> torch.Tensor:
    return functional.cross_entropy(model(IDS).reshape(-1, 31), LABELS.reshape(-1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(reentrant: bool) -> None:
    model, plain, seen = Layers(), Layers(), list[bool]()
    mask = some_mask(model, [n for n, _ in model.named_parameters() if "embed" not in n and "read.bias" not in n])
    before = bits(model)
    tuner = sc.attach(model, mask)
    model.recompute(reentrant, seen)
    own = {layer: getattr(layer, CHECKPOINTING) for layer in model.layers}
    for step in range(4):  # the first two also have taps from the modules above in place
        seen.clear()
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        expected = oracle_gradients(plain, mask, loss_of)
        loss_of(model).backward()
        assert sorted(seen) == [False, False, True, True]
        for name, values_K in tuner.values.items():
            assert values_K.grad is not None and values_K.grad.any(), name
            torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name, s=step: f"{n}, {s}: {m}")
        for values_K in tuner.parameters():
            values_K.grad = None
        train(tuner, model, 1)
    assert all(getattr(layer, CHECKPOINTING) is function for layer, function in own.items())
    tuner.detach()
    assert same_bits(bits(model), before) and all(isinstance(layer.gate, nn.Parameter) for layer in model.layers)


def test_in_evaluation_and_with_checkpointing_turned_off_the_layer_computes_once() -> None:
    model, seen = Layers(), list[bool]()
    mask = some_mask(model, ["layers.0.gate", "layers.1.gate"])
    expected = oracle_gradients(model, mask, loss_of)
    tuner = sc.attach(model, mask)
    model.recompute(False, seen)
    for change in (model.eval, lambda: [setattr(layer.train(), "gradient_checkpointing", False) for layer in model.layers]):
        change()
        loss_of(model).backward()
        for name, values_K in tuner.values.items():
            torch.testing.assert_close(values_K.grad, expected[name])
            values_K.grad = None
    assert not seen


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_of_transformers_whose_layers_own_parameters(reentrant: bool) -> None:
    from transformers import DogeConfig, DogeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = DogeForCausalLM(DogeConfig(**sizes, num_key_value_heads=1, pad_token_id=0)).train()

    def loss(m: nn.Module) -> torch.Tensor:
        return m(input_ids=IDS, labels=IDS, use_cache=False).loss  # type: ignore[no-any-return]

    mask = some_mask(model, [n for n, _ in model.named_parameters() if "residual" in n or "q_proj" in n or "layernorm" in n])
    assert any(n.endswith("layers.0.input_residual") for n in mask.names)
    expected = oracle_gradients(model, mask, loss)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    tuner = sc.attach(model, mask)
    for _ in range(3):
        loss(model).backward()
        for name, values_K in tuner.values.items():
            assert values_K.grad is not None and expected[name].any(), name
            torch.testing.assert_close(values_K.grad, expected[name], rtol=2e-4, atol=1e-7)
            values_K.grad = None
