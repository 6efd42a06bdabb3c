"""The generic path: Conv1D, norms, biases, embeddings, convolutions and fused 3-D experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pico
import speft_core as sc
from attached import bits, oracle_gradients, same_bits


class Experts(nn.Module):
    """Fused experts as in Mixtral of transformers 5: one [experts, outputs, inputs] parameter, indexed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e in range(3):  # the last expert gets no token
            rows = torch.arange(x.shape[0]) % 2 == e
            y = y + rows[:, None] * (torch.relu(x @ self.up[e].T) @ self.down[e].T)
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "layer_norm": (lambda: nn.LayerNorm(6), lambda: torch.randn(4, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), lambda: torch.randn(4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.tensor([[1, 1, 4], [8, 0, 1]])),
    "embedding_bag": (lambda: nn.EmbeddingBag(9, 6), lambda: torch.tensor([[1, 1, 4], [8, 0, 1]])),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), lambda: torch.randn(2, 2, 5, 5)),
    "bilinear": (lambda: nn.Linear(6, 5), lambda: torch.randn(6)),
    "experts": (Experts, lambda: torch.randn(5, 6)),
    "attention": (lambda: nn.GRUCell(6, 5), lambda: torch.randn(4, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_any_module_gets_the_masked_dense_gradient(case: str, dtype: torch.dtype) -> None:
    build, make_input = CASES[case]
    torch.manual_seed(0)
    model, x = build().to(dtype), make_input()
    x = x.to(dtype) if x.is_floating_point() else x

    def loss(m: nn.Module) -> torch.Tensor:
        return torch.tanh(m(x)).square().sum()

    generator = torch.Generator().manual_seed(1)
    indices, shapes = {}, {}
    for name, parameter in model.named_parameters():
        k = max(1, parameter.numel() // 3)
        indices[name] = torch.randperm(parameter.numel(), generator=generator)[:k].sort().values
        shapes[name] = tuple(parameter.shape)
    mask = sc.SparsityMask(indices, shapes)
    before, expected = bits(model), oracle_gradients(model, mask, loss)
    tuner = sc.attach(model, mask)
    first = loss(model)
    first.backward()
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[name])
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1e-2)
    optimizer.step()
    assert loss(model).item() < first.item()
    assert type(model).__name__ in repr(model)
    tuner.detach()
    assert same_bits(bits(model), before)


def test_only_the_parameter_a_mask_names_is_tapped() -> None:
    model = nn.LayerNorm(6)
    mask = sc.SparsityMask({"weight": torch.tensor([2])}, {"weight": (6,)})
    tuner = sc.attach(model, mask)
    model(torch.randn(3, 6)).sum().backward()
    assert tuner.plan()["weight"].plan == "tap" and model.weight.grad is None and model.bias.grad is None
    assert isinstance(model.weight, nn.Parameter) and dict(model.named_parameters()).keys() == {"weight", "bias", "weight_values"}


def test_a_forward_that_raises_leaves_the_parameters_visible() -> None:
    model = nn.LayerNorm(6)
    tuner = sc.attach(model, sc.SparsityMask({"weight": torch.tensor([2])}, {"weight": (6,)}))
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert "weight" not in vars(model)
    tuner.detach()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_mixture_of_experts_models_of_transformers(kind: str) -> None:
    import transformers

    small = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**small, num_local_experts=4, max_position_embeddings=32)
    else:
        more = dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, decoder_sparse_step=1)
        config = transformers.Qwen2MoeConfig(**small, **more, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss(m: nn.Module) -> torch.Tensor:
        return m(input_ids=ids, labels=ids).loss

    batch = {"input_ids": ids, "labels": ids}
    mask = sc.find_mask(model, [batch], budget=sc.Budget(density=0.05, of="targets"), targets="body", scope="local")
    assert any(len(s) == 3 and mask.indices[n].numel() for n, s in mask.shapes.items())
    before, expected = bits(model), oracle_gradients(model, mask, loss)
    tuner = sc.attach(model, mask)
    loss(model).backward()
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-3, atol=1e-7)
    tuner.detach()
    assert same_bits(bits(model), before)


def test_sparse_rows_of_a_tied_embedding_in_gpt2() -> None:
    model = pico.gpt2()
    batch = pico.batch(model)
    embedding = next(n for n, p in model.named_parameters() if "wte" in n)
    mask = sc.find_mask(model, [batch], budget=sc.Budget(k=50), targets=[embedding])
    expected = oracle_gradients(model, mask, lambda m: m(**batch).loss)
    tuner = sc.attach(model, mask)
    model(**batch).loss.backward()
    torch.testing.assert_close(tuner.values[embedding].grad, expected[embedding], rtol=1e-4, atol=1e-7)
