"""Dense parts of 16 bits: trained in fp32, rounded into the weight by every forward, shipped and taken off as any other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import speft_core as sc
from attached import IDS, LINEAR, bits, loss_of, net, same_bits, some_mask, train

SHORT = [torch.bfloat16, torch.float16]
DENSE = {"out.weight", "out.bias", "norm.weight", "norm.bias", "left.bias"}


def attached(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, sc.Tuner]:
    model = net(dtype)
    return model, sc.attach(model, some_mask(model, LINEAR[:2]), train_dense=["out", "norm", "left.bias"])


@pytest.mark.parametrize("dtype", SHORT)
def test_training_is_that_of_an_fp32_copy_rounded_into_the_weight(dtype: torch.dtype) -> None:
    """With an oracle by hand: the model's own gradient, the update on a copy in fp32."""
    model, tuner = attached(dtype)
    assert set(tuner.dense) == DENSE and all(p.dtype == torch.float32 for p in tuner.parameters())
    twin = net(dtype)
    own = {n: p for n, p in twin.named_parameters() if n in DENSE}
    copies = {n: nn.Parameter(p.detach().float()) for n, p in own.items()}
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    ours, theirs = torch.optim.AdamW(tuner.dense.values(), **settings), torch.optim.AdamW(copies.values(), **settings)  # type: ignore[arg-type]
    for _ in range(20):
        losses = loss_of(model), loss_of(twin)
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            loss.backward()
            if optimizer is theirs:
                for name, parameter in own.items():
                    copies[name].grad = parameter.grad.float()
                    parameter.grad = None
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in own.items():
            parameter.data.copy_(copies[name])
            assert torch.equal(tuner.dense[name], copies[name]), name
    assert all(torch.equal(model.get_parameter(n), p) for n, p in own.items() if loss_of(model) is not None)
    moved = {n for n, p in copies.items() if not torch.equal(p.data, p.data.to(dtype))}
    assert moved, "nothing that 16 bits would lose"


def test_updates_that_16_bits_would_lose_add_up() -> None:
    model, tuner = attached()
    weight, values = model.get_parameter("out.weight"), tuner.dense["out.weight"]
    before = weight.detach().clone()
    for _ in range(400):  # each far below half of the last bit
        with torch.no_grad():
            values += 1e-5
        model(IDS)
    torch.testing.assert_close(weight.float(), before.float() + 4e-3, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", SHORT)
def test_what_ships_is_what_is_evaluated_and_detach_gives_back_every_bit(dtype: torch.dtype) -> None:
    model = net(dtype)
    before, required = bits(model), [p.requires_grad for p in model.parameters()]
    tuner = sc.attach(model, some_mask(model, LINEAR[:2]), train_dense=["out", "norm", "left.bias"])
    assert tuner.trainable_parameters == sum(p.numel() for p in tuner.parameters())
    losses = train(tuner, model, 10)
    assert losses[-1] < losses[0]
    adapter = tuner.adapter()
    assert set(adapter.dense) == DENSE and all(t.dtype == dtype for t in adapter.dense.values())
    assert all(torch.equal(tuner.dense[n], t.float()) for n, t in adapter.dense.items())
    logits = model(IDS).detach()
    tuner.detach()
    assert same_bits(bits(model), before) and [p.requires_grad for p in model.parameters()] == required
    assert {n for n, _ in model.named_parameters()} == set(before)
    with adapter.applied(model):
        assert torch.equal(model(IDS).detach(), logits)
    assert same_bits(bits(model), before)


def test_the_models_state_has_its_own_keys_and_the_last_step() -> None:
    model, tuner = attached()
    keys = list(net(torch.bfloat16).state_dict())
    train(tuner, model, 3)  # ends with a step of the optimizer
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert list(state) == keys
    assert all(torch.equal(state[n], p.to(torch.bfloat16)) for n, p in tuner.dense.items())
    logits = model(IDS).detach()
    train(tuner, model, 3)
    assert not torch.equal(model(IDS).detach(), logits)
    assert not model.load_state_dict(state).missing_keys
    assert all(torch.equal(p, state[n].float()) for n, p in tuner.dense.items())


def test_a_tuners_state_goes_round_and_one_in_16_bits_is_taken() -> None:
    model, tuner = attached()
    train(tuner, model, 3)
    state = {k: v.clone() for k, v in tuner.state_dict().items()}
    logits = model(IDS).detach()
    assert state["dense.out.weight"].dtype == torch.float32
    train(tuner, model, 3)
    tuner.load_state_dict(state)
    assert torch.equal(model(IDS).detach(), logits)
    other, again = attached()
    again.load_state_dict({k: v.bfloat16() if k.startswith("dense") else v for k, v in state.items()})
    assert torch.equal(other(IDS).detach(), logits)


def test_wider_weights_are_trained_themselves() -> None:
    for dtype in (torch.float32, torch.float64):
        model = net(dtype)
        tuner = sc.attach(model, some_mask(model, LINEAR[:2]), train_dense=["out"])
        assert tuner.dense["out.weight"] is model.get_parameter("out.weight")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="aot_eager"),
        lambda model: lambda ids: torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False),
        copy.deepcopy,
    ],
    ids=["compiled", "checkpointed", "copied"],
)
def test_gradients_reach_them_by_every_way(wrap: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]) -> None:
    model, tuner = attached()
    loss_of(model).backward()
    expected = {n: p.grad.clone() for n, p in tuner.dense.items()}
    assert all(g.dtype == torch.float32 and g.any() for g in expected.values())
    for parameter in tuner.parameters():
        parameter.grad = None
    made = wrap(model)
    owner = made if isinstance(made, nn.Module) and not hasattr(made, "_orig_mod") else model
    nn.functional.cross_entropy(made(IDS).float().flatten(0, 1), torch.zeros(21, dtype=torch.long)).backward()
    first = {n: owner.get_parameter(f"{n}_values").grad for n in DENSE}
    loss = nn.functional.cross_entropy(model(IDS).float().flatten(0, 1), torch.zeros(21, dtype=torch.long))
    wanted = torch.autograd.grad(loss, list(tuner.dense.values()))
    for name, grad in zip(tuner.dense, wanted, strict=True):
        torch.testing.assert_close(first[name], grad, rtol=2e-2, atol=1e-4)


def test_a_failed_attach_leaves_nothing() -> None:
    model = net(torch.bfloat16)
    before = {n for n, _ in model.named_parameters()}
    with pytest.raises(sc.UserError):
        sc.attach(model, some_mask(model, LINEAR[:2]), train_dense=["out"], backward="native" if _no_native() else "quick")
    assert {n for n, _ in model.named_parameters()} == before


def _no_native() -> bool:
    from speft_core.ops import native

    return bool(native.reason())
