"""Every metric against an independent dense oracle in float64 (saliency_oracles.py), batches of unequal size and length."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import pico
import speft_core as sc
from speft_core.targets import resolve_targets

_spec = importlib.util.spec_from_file_location("saliency_oracles", Path(__file__).with_name("saliency_oracles.py"))
assert _spec is not None and _spec.loader is not None
oracles: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracles)

MODELS = ["llama", "opt", "gpt2", "bert"]
Scores = dict[str, torch.Tensor]


def check(ours: Scores, oracle: Scores, tolerance: float, nonzero: bool = True) -> None:
    """Norm of the difference over the norm of the oracle, tensor by tensor."""
    assert ours
    largest = max(float(oracle[n].norm()) for n in ours)
    for name, scores in ours.items():
        expected = oracle[name]
        size = float(expected.norm())
        if size <= 1e-7 * largest:  # in truth 0: the loss does not depend on biases of keys, which a softmax cancels
            assert float(scores.norm()) <= 1e-6 * largest, name
            continue
        assert float((scores.double() - expected).norm()) <= tolerance * size, name
    if nonzero:
        assert sum(float(s.abs().sum()) > 0 for s in ours.values()) >= len(ours) // 2


def with_weights(model: nn.Module, statistic: Scores, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Scores:
    return {n: score(p.detach().double(), statistic[n]) for n, p in model.named_parameters() if n in statistic}


GRADIENT_METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gradient": lambda w, g: abs(g),
    "snip": lambda w, g: abs(g * w),
    "force": lambda w, g: -(g * w),
    "taylor_fo": lambda w, g: (g * w) ** 2,
}


@pytest.mark.parametrize("architecture", MODELS)
def test_metrics_of_the_mean_gradient(architecture: str) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    batches = oracles.dataset(model)
    gradient = oracles.mean_gradient(model, batches)
    everything = list(dict(model.named_parameters()))
    for metric, score in GRADIENT_METRICS.items():
        ours = sc.saliency_scores(model, batches, metric, everything, loss_fn=oracles.loss64)
        check(ours, with_weights(model, gradient, score), 1e-6)


@pytest.mark.parametrize("architecture", MODELS)
def test_the_models_own_loss_and_fp32_weights(architecture: str) -> None:
    model = pico.MODELS[architecture]()
    batches = oracles.dataset(model)
    oracle = {n: g.abs() for n, g in oracles.mean_gradient(model, batches).items()}
    check(sc.saliency_scores(model, batches, "gradient", "body"), oracle, 1e-5)
    check(sc.saliency_scores(model.double(), batches, "gradient", "body"), oracle, 1e-6)


@pytest.mark.parametrize("architecture", MODELS)
def test_magnitude_and_weight_change(architecture: str) -> None:
    model, tuned = pico.MODELS[architecture](seed=0), pico.MODELS[architecture](seed=1)
    after = dict(tuned.named_parameters())
    check(sc.saliency_scores(model, metric="magnitude"), {n: p.detach().abs() for n, p in model.named_parameters()}, 0.0)
    moved = {n: (after[n] - p).detach().abs() for n, p in model.named_parameters()}
    check(sc.saliency_scores(model, metric=sc.weight_change(tuned)), moved, 1e-7)
    check(sc.saliency_scores(model, metric=sc.weight_change(tuned.state_dict())), moved, 1e-7)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("targets", ["all-linear", "everything"])
def test_scores_per_example(architecture: str, targets: str) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    batches = oracles.dataset(model)
    names = list(dict(model.named_parameters())) if targets == "everything" else targets
    fisher = sc.saliency_scores(model, batches, "fisher", names, loss_fn=oracles.loss64)
    check(fisher, oracles.of_examples(model, batches, torch.square), 1e-6)
    absolute = sc.saliency_scores(model, batches, "absolute_gradient", names, loss_fn=oracles.loss64)
    check(absolute, {n: a / 6 for n, a in oracles.of_examples(model, batches, torch.abs).items()}, 1e-6)


@pytest.mark.parametrize("architecture", MODELS)
def test_fisher_with_the_models_own_loss(architecture: str) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    batches = oracles.dataset(model)
    check(sc.saliency_scores(model, batches, "fisher"), oracles.of_examples(model, batches, torch.square), 1e-6)


def test_fisher_takes_losses_per_example_from_the_loss_function() -> None:
    model = pico.llama(dtype=torch.float64)
    batches = oracles.dataset(model)

    def per_example(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [oracles.loss64(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(len(batch["labels"]))]
        )

    check(
        sc.saliency_scores(model, batches, "fisher", loss_fn=oracles.loss64),
        oracles.of_examples(model, batches, torch.square),
        1e-6,
    )
    ours = sc.saliency_scores(model, batches[-1:], "fisher", loss_fn=per_example)
    check(ours, oracles.of_examples(model, batches[-1:], torch.square), 1e-6)


def test_fisher_sums_over_examples_however_they_are_batched() -> None:
    model = pico.opt(dtype=torch.float64)
    batch = pico.batch(model, rows=6, length=8)
    whole = sc.saliency_scores(model, [batch], "fisher", loss_fn=oracles.loss64)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 6, 2)]
    check(sc.saliency_scores(model, parts, "fisher", loss_fn=oracles.loss64), whole, 1e-6)
    squared_batch = {n: g.square() for n, g in oracles.mean_gradient(model, [batch]).items()}
    name = next(iter(whole))
    assert float((whole[name] - 6 * squared_batch[name]).norm()) > 0.1 * float(whole[name].norm())


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(("hessian", "tolerance"), [("exact", 1e-6), ("finite", 1e-3)])
def test_grasp(architecture: str, hessian: str, tolerance: float) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    batches, names = oracles.dataset(model), resolve_targets(model, "body")
    product = oracles.hessian_gradient(model, batches, names)
    oracle = with_weights(model, product, lambda w, h: -h * w)
    ours = sc.saliency_scores(model, batches, "grasp", "body", oracles.loss64, {"hessian": hessian})
    relevant = {n: s for n, s in ours.items() if float(oracle[n].norm()) > 1e-6 * max(float(o.norm()) for o in oracle.values())}
    check(relevant, oracle, tolerance)
    other = sc.saliency_scores(model, batches, "grasp", "body", oracles.loss64, {"hessian": hessian, "sign": 1})
    assert all(torch.equal(other[n], -s) for n, s in ours.items())


@pytest.mark.parametrize("architecture", MODELS)
def test_grasp_by_finite_differences_in_fp32(architecture: str) -> None:
    model = pico.MODELS[architecture]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches, names = oracles.dataset(model), resolve_targets(model, "all-linear")
    oracle = with_weights(model, oracles.hessian_gradient(model, batches, names), lambda w, h: -h * w)
    ours = sc.saliency_scores(model, batches, "grasp", options={"hessian": "finite"})
    joined = {"all": torch.cat([s.flatten() for s in ours.values()])}
    check(joined, {"all": torch.cat([oracle[n].flatten() for n in ours])}, 1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class _Once(torch.autograd.Function):
    """Twice its input; cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def test_grasp_says_why_it_took_finite_differences() -> None:
    model = pico.llama()
    model.model.norm.register_forward_hook(lambda module, args, output: _Once.apply(output))
    batches, budget = oracles.dataset(model), sc.Budget(k=50)
    mask = sc.find_mask(model, batches, "grasp", budget=budget)
    finite = sc.find_mask(model, batches, "grasp", budget=budget, options={"hessian": "finite"})
    assert mask.made["hessian"] == "finite" and "differentiated twice" in mask.made["reason"]
    assert mask.indices.keys() == finite.indices.keys() and "reason" not in finite.made
    assert all(torch.equal(indices, finite.indices[n]) for n, indices in mask.indices.items())
    with pytest.raises(RuntimeError, match="differentiated twice"):
        sc.find_mask(model, batches, "grasp", budget=budget, options={"hessian": "exact"})


@pytest.mark.parametrize("architecture", MODELS)
def test_synflow(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    oracle = with_weights(model, oracles.synaptic_flow(model, monkeypatch), lambda w, r: abs(r * w))
    check(sc.saliency_scores(model, metric="synflow", targets="all-linear"), oracle, 1e-6)
    check(sc.saliency_scores(model, metric="synflow", targets="body"), oracle, 1e-6)


class Broken(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_synflow_leaves_every_bit(architecture: str, raises: bool) -> None:
    model = pico.MODELS[architecture]()
    with torch.no_grad():
        first = next(iter(model.parameters()))
        first.view(-1)[:3] = torch.tensor([-0.0, 1e-42, -1e-42])
    before = {n: p.detach().clone().view(torch.int32) for n, p in model.named_parameters()}
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    if raises:
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]

        def fail(*_: Any) -> None:
            raise Broken

        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            sc.saliency_scores(model, metric="synflow")
        hook.remove()
    else:
        sc.saliency_scores(model, metric="synflow")
    assert all(torch.equal(p.detach().view(torch.int32), before[n]) for n, p in model.named_parameters())
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("architecture", MODELS)
def test_wanda_ignores_padding(architecture: str) -> None:
    model = pico.MODELS[architecture](dtype=torch.float64)
    batches, names = oracles.dataset(model), resolve_targets(model, "all-linear")
    if architecture == "bert":  # the pooler reads one token of each example, which is never padding
        assert any("pooler" in n for n in names)
    oracle = with_weights(model, oracles.input_norms(model, batches, names), lambda w, x: w.abs() * x)
    check(sc.saliency_scores(model, batches, "wanda"), oracle, 1e-6)


def test_wanda_wants_linear_weights() -> None:
    model = pico.bert()
    with pytest.raises(sc.UserError, match="only weights of linear layers"):
        sc.saliency_scores(model, [pico.batch(model)], "wanda", "body")


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_snip_and_taylor_choose_the_same(architecture: str, scope: str) -> None:
    model = pico.MODELS[architecture]()
    with torch.no_grad():  # gradients so small that their squares would all be 0 in fp32
        for parameter in model.parameters():
            parameter.mul_(1.0)
    batches = oracles.dataset(model)

    def tiny(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss * 1e-20

    for loss_fn in (None, tiny):
        masks = [
            sc.find_mask(model, batches, metric, sc.Budget(density=0.1, of="targets"), scope=scope, loss_fn=loss_fn)
            for metric in ("snip", "taylor_fo")
        ]
        assert masks[0] == masks[1]
        assert masks[0].nnz > 0


def test_fused_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
            initializer_range=0.2,
        )
    ).double().eval()  # fmt: skip
    model.set_experts_implementation("eager")  # grouped products know no float64
    names = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert names
    batches = oracles.dataset(model)
    gradient = oracles.mean_gradient(model, batches)
    ours = sc.saliency_scores(model, batches, "gradient", names, oracles.loss64)
    check(ours, {n: g.abs() for n, g in gradient.items()}, 1e-6)
    fisher = sc.saliency_scores(model, batches, "fisher", names, oracles.loss64)
    check(fisher, oracles.of_examples(model, batches, torch.square), 1e-6)
    mask = sc.find_mask(model, batches, "gradient", sc.Budget(k=100), targets=names, structure="rows", min_per_layer=None)
    assert 0 < mask.nnz <= 100
