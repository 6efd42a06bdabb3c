"""Models that are not like Transformers': whatever they do with a layer, scores are those of the plain model, or one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pico
import speft_core as sc
from speft_core.saliency.metrics import METRICS

Scores = dict[str, torch.Tensor]


class Tokens(nn.Module):
    """Tokens [B, T] to logits [B, T, 11] over one hidden layer, which `through` calls on [B, T, 6]."""

    def __init__(self, through: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda layer, x: layer(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.through = through

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.tanh(self.through(self.hidden, self.embed(input_ids))))
        return {"loss": functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]), "logits": logits}


def batch(rows: int = 3, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def scores(model: nn.Module, metric: str, batches: list[Any]) -> Scores:
    return sc.saliency_scores(model, batches, metric, ["hidden.weight", "hidden.bias"])


def same(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys() and all(bool(s.any()) for s in expected.values())
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


@pytest.mark.parametrize("metric", ["gradient", "fisher", "absolute_gradient"])
def test_flattened_tokens_are_told_apart_by_example(metric: str) -> None:
    flat = Tokens(lambda layer, x: layer(x.reshape(-1, 6)).view(x.shape))
    same(scores(flat, metric, [batch()]), scores(Tokens(), metric, [batch()]))


@pytest.mark.parametrize("metric", ["gradient", "fisher", "absolute_gradient"])
def test_examples_that_cannot_be_told_apart_are_taken_one_at_a_time(metric: str) -> None:
    """As where the input of a layer starts with the tokens, or holds the labelled positions of all examples in one row."""
    for way in (lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1), lambda layer, x: layer(x.reshape(1, 1, *x.shape))[0, 0]):
        same(scores(Tokens(way), metric, [batch()]), scores(Tokens(), metric, [batch()]))


@pytest.mark.parametrize("metric", ["fisher", "absolute_gradient"])
def test_a_batch_without_labels_adds_nothing(metric: str) -> None:
    model = pico.llama()
    plain, silent = pico.batch(model), pico.batch(model, seed=1)
    silent["labels"] = torch.full_like(silent["labels"], -100)
    alone, both = (sc.saliency_scores(model, batches, metric) for batches in ([plain], [plain, silent]))
    for name, score in alone.items():
        torch.testing.assert_close(both[name], score / (2 if metric == "absolute_gradient" else 1))  # the mean counts examples


def test_a_forward_of_the_instance_and_one_without_gradient_are_let_be() -> None:
    def with_a_look(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layer(x)
        return layer(x)

    wrapped = Tokens(with_a_look)
    original = wrapped.hidden.forward
    wrapped.hidden.forward = own = lambda x: original(x)  # type: ignore[method-assign, assignment]
    same(scores(wrapped, "gradient", [batch()]), scores(Tokens(), "gradient", [batch()]))
    assert wrapped.hidden.forward is own


def test_wanda_takes_the_inputs_of_a_head_tied_to_the_embeddings() -> None:
    tied = pico.llama(tied=True)
    untied = pico.llama(tied=False)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight})
    found = sc.saliency_scores(tied, [pico.batch(tied)], "wanda", ["embed_tokens"])
    expected = sc.saliency_scores(untied, [pico.batch(tied)], "wanda", ["lm_head"])
    torch.testing.assert_close(next(iter(found.values())), next(iter(expected.values())))
    with pytest.raises(sc.UserError, match=r"wanda scores only weights of linear layers, model\.embed_tokens\.weight is none"):
        sc.saliency_scores(untied, [pico.batch(tied)], "wanda", ["embed_tokens"])


class Flow(nn.Module):
    """A model for synflow: embeddings, `body`, and what `give` makes of the output."""

    def __init__(self, body: nn.Module, give: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.inner, self.body, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), body, nn.Linear(6, 4)
        self.give = give

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, inputs_embeds: torch.Tensor) -> Any:
        return self.give(self.out(self.body(self.inner(inputs_embeds))))


class ByHand(nn.Module):
    """RMSNorm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


GIVEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "logits": lambda y: {"other": 3 * y, "logits": y},
    "first of a mapping": lambda y: {"y": y, "other": 3 * y},
}


@pytest.mark.parametrize("give", GIVEN)
def test_synflow_takes_any_output_and_any_root_mean_square(give: str) -> None:
    def of(body: nn.Module, give: str) -> Scores:
        return sc.saliency_scores(Flow(body, GIVEN[give]), metric="synflow", targets=["inner.weight", "out.weight"])

    same(of(nn.RMSNorm(6, eps=1e-5), give), of(ByHand(), "tensor"))


def test_what_synflow_cannot_look_into_is_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x)[0]

    with pytest.raises(sc.UserError, match="cannot look into torch.nn.MultiheadAttention"):
        sc.saliency_scores(Flow(Attention().train(), GIVEN["tensor"]), metric="synflow", targets=["out.weight"])
    with pytest.raises(sc.UserError, match=r"needs a model with get_input_embeddings\(\)"):
        sc.saliency_scores(Tokens(), metric="synflow", targets=["hidden.weight"])
    huge = Flow(nn.Identity(), GIVEN["tensor"])
    with torch.no_grad():
        for parameter in (huge.inner.weight, huge.out.weight):
            parameter.fill_(1e30)
    with pytest.raises(sc.UserError, match="the flow of ones is inf in torch.float32; load the model in fp32"):
        sc.saliency_scores(huge, metric="synflow", targets=["inner.weight"])
    assert bool((huge.out.weight == 1e30).all())


def test_a_flat_loss_has_no_curvature_and_16_bits_no_differences() -> None:
    model = pico.llama()

    def flat(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch).logits.sum() * 0.0

    found = sc.saliency_scores(model, [pico.batch(model)], "grasp", loss_fn=flat, options={"hessian": "finite"})
    assert found and not any(bool(s.any()) for s in found.values())
    with pytest.raises(sc.UserError, match=r"needs fp32 weights, .* is torch\.bfloat16; load the model in fp32"):
        sc.saliency_scores(model.bfloat16(), [pico.batch(model)], "grasp", options={"hessian": "finite"})


def test_metrics_and_batches_that_make_no_sense() -> None:
    model = Tokens()
    assert {n for n, m in METRICS.items() if not m.needs_gradient} == {"magnitude", "synflow", "random"}
    with pytest.raises(sc.UserError, match="the random metric draws indices from the seed and has no scores"):
        sc.saliency_scores(model, metric="random", targets=["hidden.weight"])
    with pytest.raises(sc.UserError, match=r"score must be a function of \(weight, statistic\), got int"):
        sc.register_metric("three", 3)  # type: ignore[arg-type]
    with pytest.raises(sc.UserError, match=r"weight_change needs hidden\.weight of shape \(6, 6\) in the tuned model"):
        sc.saliency_scores(model, metric=sc.weight_change({"hidden.weight": torch.ones(6)}), targets=["hidden.weight"])
    with pytest.raises(sc.UserError, match="the model returned no loss; give batches with labels, or a loss_fn"):
        sc.saliency_scores(nn.Linear(3, 3), [{"input": torch.ones(1, 3)}], "gradient", ["weight"])
    for nothing in ({"text": "words"}, {"scalar": torch.ones(())}, [torch.ones(2)]):
        with pytest.raises(sc.UserError, match="must hold at least one tensor whose first dimension counts the examples"):
            scores(model, "gradient", [nothing])


@pytest.mark.parametrize("metric", ["gradient", "fisher", "absolute_gradient"])
def test_a_layer_that_is_called_twice_counts_with_the_sum_of_both(metric: str) -> None:
    twice = Tokens(lambda layer, x: layer(torch.tanh(layer(x))))
    found, batches = scores(twice, metric, [batch(), batch(2, seed=1)]), [batch(), batch(2, seed=1)]
    same(found, by_hand(twice, metric, batches))


@pytest.mark.parametrize("metric", ["gradient", "fisher", "absolute_gradient"])
@pytest.mark.parametrize("way", ["read", "read and called", "by keyword"])
def test_a_weight_that_is_read_counts_as_one_that_is_called(metric: str, way: str) -> None:
    ways: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
        "read": lambda layer, x: functional.linear(x, layer.weight, layer.bias),  # type: ignore[arg-type]
        "read and called": lambda layer, x: layer(x) @ layer.weight,  # type: ignore[operator]
        "by keyword": lambda layer, x: layer(input=x),
    }
    model, batches = Tokens(ways[way]), [batch(), batch(2, seed=1)]
    same(scores(model, metric, batches), by_hand(model, metric, batches))
    assert isinstance(model.hidden.weight, nn.Parameter)


@pytest.mark.parametrize("metric", ["fisher", "absolute_gradient"])
def test_scores_per_example_under_autocast(metric: str) -> None:
    class Cast(Tokens):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(input_ids, labels)

    found, expected = scores(Cast(), metric, [batch()]), scores(Tokens(), metric, [batch()])
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=0.1, atol=0.05 * score.max().item())


def by_hand(model: Tokens, metric: str, batches: list[Any]) -> Scores:
    """From plain gradients of single examples."""
    parameters = {n: p.requires_grad_(True) for n, p in model.named_parameters() if n.startswith("hidden")}
    function = {"gradient": lambda g: g, "fisher": torch.square, "absolute_gradient": torch.abs}[metric]
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    examples = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    for example in examples:
        for name, g in zip(sums, torch.autograd.grad(model(**example)["loss"], list(parameters.values())), strict=True):
            sums[name] += function(g)
    return {n: s if metric == "fisher" else s.abs() / len(examples) for n, s in sums.items()}


def test_wanda_sees_inputs_given_by_keyword() -> None:
    by_name = Tokens(lambda layer, x: layer(input=x))
    targets = ["hidden.weight"]
    found, expected = (sc.saliency_scores(m, [batch()], "wanda", targets) for m in (by_name, Tokens()))
    torch.testing.assert_close(found["hidden.weight"], expected["hidden.weight"])
