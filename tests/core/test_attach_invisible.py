"""attach and the model around it: names, hooks, keys, state and tied weights stay what they were; mistakes leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import speft_core as sc
from attached import IDS, LINEAR, PLAN_NAMES, Net, bits, loss_of, net, oracle_gradients, same_bits, some_mask, train
from speft_core.targets import base_parameters


def test_names_keys_modules_and_hooks_stay_as_they_were() -> None:
    model = net()
    keys, modules = list(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
    seen: list[str] = []
    model.left.register_forward_hook(lambda *_: seen.append("forward"))
    model.left.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.left.register_full_backward_hook(lambda *_: seen.append("backward"))
    tuner = sc.attach(model, some_mask(model))
    assert list(model.state_dict()) == keys
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    loss_of(model).backward()
    assert seen == ["pre", "forward", "backward"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}_values" for n in tuner.values}
    tuner.detach()
    assert list(model.state_dict()) == keys
    assert {n for n, _ in model.named_parameters()} == set(keys)
    assert "forward" not in vars(model.left)
    seen.clear()
    loss_of(model).backward()
    assert seen == ["pre", "forward", "backward"]


def test_a_forward_set_on_the_instance_is_called_and_put_back() -> None:
    model, calls = net(), []
    own = model.left.forward

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return own(x)

    model.left.forward = counting  # type: ignore[method-assign]
    mask = some_mask(model)
    expected = oracle_gradients(net(), mask)
    tuner = sc.attach(model, mask)
    assert tuner.plan()["left.weight"].plan == "tap"
    loss_of(model).backward()
    assert calls
    torch.testing.assert_close(tuner.values["left.weight"].grad, expected["left.weight"], rtol=1e-5, atol=1e-7)
    tuner.detach()
    assert model.left.forward is counting


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_tied_weights_stay_tied_and_get_the_sum_of_both_gradients(backward: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 12)
            self.mid = nn.Linear(12, 12)
            self.head = nn.Linear(12, 31, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.mid(self.embed(ids))))

    torch.manual_seed(0)
    model = Tied()
    mask = some_mask(model)
    assert "head.weight" not in mask.indices
    before, expected = bits(model), oracle_gradients(model, mask)
    tuner = sc.attach(model, mask, backward=backward)
    assert model.head.weight is model.embed.weight
    loss_of(model).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)
    assert len(list(tuner.parameters())) == len({id(p) for p in tuner.parameters()}) == 3
    train(tuner, model, 3)
    assert model.head.weight is model.embed.weight
    tuner.detach()
    assert same_bits(bits(model), before)


def test_load_state_dict_while_attached_turns_the_weights_into_values() -> None:
    model, mask = net(), some_mask(net(), LINEAR)
    before = bits(model)
    tuner = sc.attach(model, mask)
    train(tuner, model, 5)
    tuner.sync()
    trained, logits = bits(model), model(IDS).detach()
    values = {n: v.detach().clone() for n, v in tuner.values.items()}
    tuner.detach()
    tuner = sc.attach(model, mask)
    model.load_state_dict(trained)
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.detach(), values[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(IDS).detach(), logits)
    model.load_state_dict(before)
    assert all(not v.detach().any() for v in tuner.values.values())
    tuner.detach()
    assert same_bits(bits(model), before)


def test_a_tuners_own_state_goes_round_and_another_masks_is_refused() -> None:
    model, mask = net(), some_mask(net())
    tuner = sc.attach(model, mask)
    train(tuner, model, 3)
    state, logits = {k: v.clone() for k, v in tuner.state_dict().items()}, model(IDS).detach()
    train(tuner, model, 3)
    assert not torch.equal(model(IDS).detach(), logits)
    tuner.load_state_dict(state)
    assert torch.equal(model(IDS).detach(), logits)
    with pytest.raises(sc.UserError, match="another mask"):
        tuner.load_state_dict({k: v for k, v in state.items() if "left" not in k})
    wrong = dict(state, **{"values.out.weight": torch.zeros(3)})
    with pytest.raises(sc.UserError, match=r"values.out.weight has shape \(3,\)"):
        tuner.load_state_dict(wrong)
    assert torch.equal(model(IDS).detach(), logits)


def test_values_written_behind_torchs_back_reach_the_next_training_forward() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    first = model(IDS).detach()
    for values_K in tuner.values.values():
        values_K.data.add_(0.3)
    assert not torch.equal(model(IDS).detach(), first)


def test_train_dense_trains_a_whole_head_and_detach_takes_it_back() -> None:
    model = net()
    before = bits(model)
    tuner = sc.attach(model, some_mask(model, LINEAR[:2]), train_dense=["out"])
    assert set(tuner.dense) == {"out.weight", "out.bias"}
    assert tuner.trainable_parameters == sum(p.numel() for p in tuner.parameters())
    losses = train(tuner, model, 10)
    assert losses[-1] < losses[0] and not torch.equal(model.out.weight, before["out.weight"])
    adapter = tuner.adapter()
    logits = model(IDS).detach()
    tuner.detach()
    assert same_bits(bits(model), before)
    with adapter.applied(model):
        assert torch.equal(model(IDS).detach(), logits)
    assert same_bits(bits(model), before)


def test_a_model_moved_after_attaching_still_trains() -> None:
    model, mask = net(), some_mask(net())
    expected = oracle_gradients(model.double(), mask)
    model.float()
    tuner = sc.attach(model, mask)
    model.double()
    assert all(v.dtype == torch.float64 for v in tuner.values.values())
    loss_of(model).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, k: sc.attach(m, k, backward="quick"), "backward must be auto or one of"),
        (lambda m, k: sc.attach(m, k, train_dense="out"), "train_dense must be a list"),
        (lambda m, k: sc.attach(m, k, train_dense=["ouut"]), "'ouut' matches no parameter. Did you mean 'out'"),
        (lambda m, k: sc.attach(m, k, train_dense=["left"]), "in train_dense; it can be only one"),
        (lambda m, k: sc.attach(nn.Linear(2, 2), k), "has no parameter"),
        (lambda m, k: sc.attach(Net(width=8), k), "has shape"),
        (lambda m, k: (sc.attach(m, k), sc.attach(m, k)), "attached already"),
        (lambda m, k: (sc.SparseAdapter({}, {}).apply(m), sc.attach(m, k)), "restore it before attaching"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_model_alone(change: object, message: str) -> None:
    model = net()
    before = bits(model)
    with pytest.raises(sc.UserError, match=message) as caught:
        change(model, some_mask(model))  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert same_bits(bits(model), before)


def test_a_weight_that_cannot_be_adapted_leaves_no_trace() -> None:
    model = net()
    mask = some_mask(model)
    model.out.weight = nn.Parameter(torch.randn(20, 31).t())
    before = dict(model.named_parameters())
    with pytest.raises(sc.UserError, match="out.weight: only contiguous floating-point"):
        sc.attach(model, mask)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert not any("_values" in n or "_base" in n for n in dict(model.named_buffers()))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("behind", [False, True])
def test_a_checkpoint_of_an_attached_model_holds_the_last_step(behind: bool) -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    train(tuner, model, 3)  # ends with a step of the optimizer
    if behind:
        for values_K in tuner.values.values():
            values_K.data.add_(0.1)  # as engines write
    saved = bits(model)
    tuner.sync()
    assert same_bits(saved, {n: p.detach() for n, p in model.named_parameters() if not n.endswith("_values")})
    other = net()
    other.load_state_dict(saved)
    assert torch.equal(other(IDS), model(IDS))


def test_tensors_given_for_one_call_are_used_and_left_alone() -> None:
    model = net()
    given = {n: p.detach() + 0.25 for n, p in model.named_parameters()}
    copies, plain = {n: t.clone() for n, t in given.items()}, net()
    plain.load_state_dict(given)
    tuner = sc.attach(model, some_mask(model))
    train(tuner, model, 2)
    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            found = torch.func.functional_call(model, given, (IDS,))
        torch.testing.assert_close(found, plain(IDS))
        if with_gradient:
            found.sum().backward()
    assert all(torch.equal(given[n], t) for n, t in copies.items())
    before = {n: v.detach().clone() for n, v in tuner.values.items()}
    torch.func.functional_call(model, {f"{n}_values": v + 1 for n, v in before.items()}, (IDS,))
    assert all(torch.equal(v, before[n]) for n, v in tuner.values.items())


@pytest.mark.parametrize("backward", PLAN_NAMES)
def test_second_derivatives_are_refused_and_not_left_out(backward: str) -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model, LINEAR), backward=backward)
    loss = loss_of(model)
    gradients = torch.autograd.grad(loss, list(tuner.parameters()), create_graph=True)
    for found, first in zip(gradients, torch.autograd.grad(loss_of(model), list(tuner.parameters())), strict=True):
        torch.testing.assert_close(found, first)
    with pytest.raises(RuntimeError, match="an attached linear layer has no second derivatives"):
        torch.stack([g.square().sum() for g in gradients]).sum().backward()


def test_a_deep_copys_values_are_no_parameters_of_the_base() -> None:
    model = net()
    sc.attach(model, some_mask(model))
    twin = copy.deepcopy(model)
    names = [n for n, _ in net().named_parameters()]
    assert list(base_parameters(twin)) == list(base_parameters(model)) == names
    assert sc.find_mask(twin, metric="magnitude", targets="body", budget=sc.Budget(k=9)).nnz == 9


def test_a_state_of_other_entries_of_the_same_sizes_is_refused() -> None:
    first, second = net(), net()
    one = sc.attach(first, some_mask(first, seed=0))
    other = sc.attach(second, some_mask(second, seed=1))
    train(one, first, 2)
    with pytest.raises(sc.UserError, match="same sizes, but other entries"):
        other.load_state_dict(one.state_dict())
    assert not any(v.any() for v in other.values.values())
    averaged = {k: (v + v + v) / 3 for k, v in one.state_dict().items()}
    sc.attach(net(), some_mask(net(), seed=0)).load_state_dict(averaged)
    older = {k: v for k, v in one.state_dict().items() if k != "mask"}
    sc.attach(net(), some_mask(net(), seed=0)).load_state_dict(older)


@pytest.mark.parametrize("search", ["backward", "grad"])
def test_a_penalty_on_the_gradient_of_a_constant_is_refused_too(search: str) -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(torch.tanh(self.body(x)))

    torch.manual_seed(0)
    model, x = Scorer(), torch.randn(4, 6, requires_grad=True)
    tuner = sc.attach(model, some_mask(model, ["score.weight"]))
    logits = model(x)
    (penalty,) = torch.autograd.grad(logits.sum(), x, create_graph=True)  # `score` gets ones, which have no graph
    loss = logits.square().mean() + 0.1 * penalty.square().mean()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        loss.backward() if search == "backward" else torch.autograd.grad(loss, list(tuner.parameters()))
