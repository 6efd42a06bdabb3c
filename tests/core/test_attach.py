"""attach and detach: exact, invisible to everything but the gradient, and equal to dense training with a masked gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pico
import speft_core as sc
from attached import DTYPES, IDS, PLAN_NAMES, Net, bits, loss_of, net, oracle_gradients, same_bits, some_mask, train
from speft_core.ops.functions import SparseLinear, Work
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_detaching_after_20_steps_gives_back_every_bit(backward: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    model.left.weight.data[:, :3] = torch.tensor([-0.0, 1e-40, 1e-8], dtype=dtype)  # what a sum and a difference lose
    before, required = bits(model), [p.requires_grad for p in model.parameters()]
    tuner = sc.attach(model, some_mask(model), train_dense=[], backward=backward)
    losses = train(tuner, model, 20)
    assert losses[-1] < losses[0]
    assert not same_bits(bits(model), before)
    tuner.detach()
    assert same_bits(bits(model), before)
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    tuner.detach()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("backward", PLAN_NAMES)
@pytest.mark.parametrize("density", [0.002, 0.1, 1.0])
def test_gradients_equal_the_dense_oracles(backward: str, density: float) -> None:
    model = net()
    mask = some_mask(model, density=density)
    expected = oracle_gradients(model, mask)
    tuner = sc.attach(model, mask, backward=backward)
    loss_of(model).backward()
    assert any(bool(v.any()) for v in expected.values())
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_gradients_in_bf16_lie_within_two_percent(backward: str) -> None:
    model = net(torch.bfloat16)
    mask = some_mask(model)
    expected = oracle_gradients(model.float(), mask)
    tuner = sc.attach(model.bfloat16(), mask, backward=backward)
    loss_of(model).backward()
    for name, values_K in tuner.values.items():
        assert values_K.dtype == torch.float32 and values_K.grad is not None
        assert float((values_K.grad - expected[name]).norm() / expected[name].norm()) <= 2e-2


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_30_steps_equal_dense_training_with_a_masked_gradient(backward: str) -> None:
    model, mask = net(), some_mask(net())
    dense = copy.deepcopy(model)
    keep = {n: torch.zeros(p.numel()) for n, p in dense.named_parameters()}
    for name, indices_K in mask.indices.items():
        keep[name][indices_K.long()] = 1.0
    tuner = sc.attach(model, mask, backward=backward)
    own = dict(lr=1e-2, weight_decay=0.0)
    ours, theirs = torch.optim.AdamW(tuner.parameters(), **own), torch.optim.AdamW(dense.parameters(), **own)  # type: ignore[arg-type]
    losses = []
    for _ in range(30):
        pair = [loss_of(model), loss_of(dense)]
        for loss in pair:
            loss.backward()
        for name, parameter in dense.named_parameters():
            assert parameter.grad is not None
            parameter.grad *= keep[name].view(parameter.shape)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        losses.append([loss.item() for loss in pair])
        assert losses[-1][0] == pytest.approx(losses[-1][1], abs=1e-5)
    assert losses[-1][0] < losses[0][0] - 0.1
    tuner.sync()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.state_dict()[name], parameter.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_two_forwards_before_one_backward(backward: str) -> None:
    model, mask = net(), some_mask(net())
    expected = oracle_gradients(model, mask, lambda m: loss_of(m) + loss_of(m).square())
    tuner = sc.attach(model, mask, backward=backward)
    (loss_of(model) + loss_of(model).square()).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_and_a_graph_can_be_walked_twice() -> None:
    model, mask = net(), some_mask(net())
    expected = oracle_gradients(model, mask)
    tuner = sc.attach(model, mask)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, 2 * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backward", PLAN_NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, backward: str) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.embed(ids)).requires_grad_()

            def block(x: torch.Tensor) -> torch.Tensor:
                return self.norm(torch.nn.functional.silu(self.left(x)) * self.right(x))

            return self.out(checkpoint(block, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    model = Checkpointed()
    mask = some_mask(model, ["left.weight", "left.bias", "right.weight", "norm.weight", "out.weight"])
    expected = oracle_gradients(model, mask)
    tuner = sc.attach(model, mask, backward=backward)
    loss_of(model).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_autocast_matches_the_dense_gradient_under_autocast(backward: str) -> None:
    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    model, mask = net(), some_mask(net())
    expected = oracle_gradients(model, mask, loss)
    tuner = sc.attach(model, mask, backward=backward)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).dtype == torch.bfloat16
    loss(model).backward()
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None and values_K.grad.dtype == torch.float32
        assert float((values_K.grad - expected[name]).norm() / expected[name].norm()) <= 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trained_forward_is_the_base_models_own_matmul(dtype: torch.dtype) -> None:
    model = net(dtype)
    with torch.no_grad():
        base = model(IDS)
    tuner = sc.attach(model, some_mask(model))
    assert torch.equal(model(IDS).detach(), base)
    train(tuner, model, 3)
    tuner.sync()
    merged = net(dtype)
    merged.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS), merged(IDS))
    assert torch.equal(model(IDS).detach(), merged(IDS).detach())


def test_frozen_inputs_give_gradients_without_grad_x() -> None:
    layer = nn.Linear(5, 4)
    mask = sc.SparsityMask({"weight": torch.tensor([0, 7, 19])}, {"weight": (4, 5)})
    tuner = sc.attach(layer, mask)
    x = torch.randn(3, 5)
    layer(x).sum().backward()
    assert tuner.values["weight"].grad is not None
    torch.testing.assert_close(tuner.values["weight"].grad, x.sum(0)[torch.tensor([0, 2, 4])])


@pytest.mark.parametrize("name", list(pico.MODELS))
@pytest.mark.parametrize("targets", ["all-linear", "body"])
def test_real_architectures_match_the_oracle(name: str, targets: str) -> None:
    model = pico.MODELS[name]()
    batch = pico.batch(model)
    mask = sc.find_mask(model, [batch], budget=sc.Budget(density=0.05, of="targets"), targets=targets)

    def loss(m: nn.Module) -> torch.Tensor:
        return m(**batch).loss

    before, expected = bits(model), oracle_gradients(model, mask, loss)
    tuner = sc.attach(model, mask)
    loss(model).backward()
    for weight, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[weight], rtol=2e-4, atol=1e-7)
    tuner.detach()
    assert same_bits(bits(model), before)


def test_reentrant_checkpointing_of_a_transformers_model_loses_no_gradient() -> None:
    model = pico.llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    batch = pico.batch(model)
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=60))
    expected = oracle_gradients(model, mask, lambda m: m(**batch).loss)
    hooks = len(model.get_input_embeddings()._forward_hooks)
    tuner = sc.attach(model, mask)
    model(**batch).loss.backward()
    assert any(bool(v.any()) for v in expected.values())
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[name], rtol=2e-4, atol=1e-7)
    tuner.detach()
    assert len(model.get_input_embeddings()._forward_hooks) == hooks


def test_a_weight_gathered_anew_for_backward_gets_its_values_before_grad_x() -> None:
    x, weight, base = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4, 5)
    indices_K, values_K = torch.tensor([2, 11, 19], dtype=torch.int32), torch.randn(3, requires_grad=True)
    layout = Layout.of(indices_K, (4, 5))
    written: list[int] = []

    def rewrite() -> None:
        written.append(1)
        weight.copy_(base)

    for wants_x in (True, False):
        given = x.clone().requires_grad_(wants_x)
        SparseLinear.apply(given, weight, None, values_K, Work(PLANS["dense"], layout), None, rewrite).sum().backward()
        assert len(written) == 1  # before grad_x, and only for it
        if wants_x:
            torch.testing.assert_close(given.grad, base.sum(0).expand(3, 5))


def test_what_a_tuner_yields_is_what_trains() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model, ["left.weight"]), train_dense=["out"])
    named = dict(tuner.named_parameters())
    assert list(named) == ["left.weight", "out.weight", "out.bias"]
    assert [id(p) for p in tuner.parameters()] == [id(p) for p in named.values()]
    assert named["left.weight"] is tuner.values["left.weight"] and named["out.bias"] is model.out.bias
    slot = tuner._slots["left.weight"][0]
    assert slot.work_on(torch.device("cpu")) is slot.work
    moved = slot.work_on(torch.device("meta"))
    assert moved.layout.rows_R.device.type == "meta" and slot.work_on(torch.device("meta")) is moved
    with pytest.raises(sc.UserError, match=r"dtype must be one of torch\.float32.*got torch\.int8"):
        tuner.adapter(torch.int8)


def test_a_state_without_the_weight_leaves_what_was_learned() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model, ["left.weight"]))
    train(tuner, model, 3)
    before = loss_of(model).item()
    model.load_state_dict({"norm.weight": model.norm.weight.detach().clone()}, strict=False)
    assert tuner.values["left.weight"].any() and loss_of(model).item() == before


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_a_deep_copy_of_an_attached_model_trains_by_itself(backward: str) -> None:
    model = net()
    before = bits(model)
    tuner = sc.attach(model, some_mask(model), train_dense=[], backward=backward)
    train(tuner, model, 2)
    trained = bits(model)
    twin = copy.deepcopy(model)
    other = twin._speft_tuner
    assert isinstance(other, sc.Tuner) and other is not tuner and same_bits(bits(twin), trained)
    losses = train(other, twin, 2)
    assert same_bits(bits(model), trained) and train(tuner, model, 2) == losses  # the same steps, each in its own weights
    values = {name: values_K.detach().clone() for name, values_K in tuner.values.items()}
    twin.load_state_dict(trained)
    loss_of(twin)
    assert same_bits(bits(twin), trained)
    assert all(torch.equal(values[name], values_K) for name, values_K in tuner.values.items())
    other.detach()
    assert same_bits(bits(twin), before) and list(twin.state_dict()) == list(before)
    tuner.detach()
    assert same_bits(bits(model), before)
