"""Dense parts of 16 bits: trained in fp32, rounded into the weight by every forward, shipped and taken off as any other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import speft_core as sc
from attached import IDS, LINEAR, bits, loss_of, net, same_bits, some_mask, train
from speft_core.whole_slots import WholeSlot

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


class Heads(nn.Module):
    """A head for each task, called or read from above: `task` says which, `reads` how."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(31, 12), nn.ModuleDict({"first": nn.Linear(12, 5), "late": nn.Linear(12, 5)})
        self.task = "first"
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        head = self.heads[self.task]
        return functional.linear(torch.tanh(self.embed(ids)), head.weight, head.bias)  # type: ignore[arg-type]


def test_a_head_that_is_first_read_from_above_long_after_training_began_trains() -> None:
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        models.append(Heads(torch.bfloat16).to(dtype))
    tuners = [sc.attach(m, some_mask(m, ["embed.weight"]), train_dense=["heads"]) for m in models]
    for task in ["first"] * 12 + ["late"]:
        for model, tuner in zip(models, tuners, strict=True):
            model.task = task
            for parameter in tuner.parameters():
                parameter.grad = None
            model(IDS).float().square().sum().backward()
    found, wanted = (t.dense["heads.late.weight"].grad for t in tuners)
    assert found is not None and wanted.any()
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)


LENT = ["out.weight", "out.bias", "norm.weight", "left.bias"]


@pytest.mark.parametrize("compiled", [False, True])
def test_lent_tensors_are_what_is_computed_with_and_get_their_gradients(compiled: bool) -> None:
    model, tuner = attached()
    train(tuner, model, 3)
    plain = net(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    lent = {n: torch.randn_like(plain.get_parameter(n)) for n in LENT}
    found, wanted = [], []
    for each, into in ((model, found), (plain, wanted)):
        given = {n: t.clone().requires_grad_() for n, t in lent.items()}

        def run(ids: torch.Tensor, each: nn.Module = each, given: dict[str, torch.Tensor] = given) -> torch.Tensor:
            return torch.func.functional_call(each, given, (ids,))  # type: ignore[no-any-return]

        logits = (torch.compile(run, backend="aot_eager") if compiled and each is model else run)(IDS)
        logits.float().square().mean().backward()
        into += [logits.detach(), *(t.grad for t in given.values())]
    assert all(torch.equal(a, b) for a, b in zip(found[:1], wanted[:1], strict=True))
    for name, a, b in zip(LENT, found[1:], wanted[1:], strict=True):
        assert a is not None and b.any(), name
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert all(tuner.dense[n].grad is None for n in LENT)
    assert all(torch.equal(model.get_parameter(n), plain.get_parameter(n)) for n in LENT)


def test_a_graph_computes_with_a_lent_tensor_that_is_masked() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    train(tuner, model, 3)
    lent = {n: torch.randn_like(model.get_parameter(n)) for n in LENT}

    def run(ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, lent, (ids,))  # type: ignore[no-any-return]

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, backend="aot_eager")(IDS), run(IDS))


def test_dense_parts_alone_cost_no_python_in_backward_once_it_is_known_who_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(torch.bfloat16)
    tuner = sc.attach(model, sc.SparsityMask({}, {}), train_dense=["bias"])
    came: list[str] = []
    real = WholeSlot._came
    monkeypatch.setattr(WholeSlot, "_came", lambda self, *rest: came.append(self.name) or real(self, *rest))
    train(tuner, model, 1)
    assert set(came) == set(tuner.dense)
    came.clear()
    train(tuner, model, 2)
    assert not came and not any(m._forward_pre_hooks for m in model.modules())


def test_what_an_engine_writes_unseen_is_in_the_next_forward_and_in_the_weight() -> None:
    model, tuner = attached()
    twin = net(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    for with_gradient in (True, True, False, True):
        loss_of(model).backward()
        for name, parameter in tuner.dense.items():
            parameter.data.add_(0.5)
            twin.get_parameter(name).data.copy_(parameter.data)
        with torch.set_grad_enabled(with_gradient):
            assert torch.equal(model(IDS), twin(IDS))
        assert all(torch.equal(model.get_parameter(n), twin.get_parameter(n)) for n in tuner.dense)


class Gated(nn.Module):
    """Checkpoints a method that reads a parameter of its own."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate, self.again = nn.Embedding(31, 12), nn.Parameter(torch.randn(12)), again
        self.to(torch.bfloat16)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.gate)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return checkpoint(self._inner, x, use_reentrant=True) if self.again else self._inner(x)  # type: ignore[no-any-return]


def test_what_a_checkpointed_method_reads_again_is_of_this_step() -> None:
    """It gives the gate no gradient (docs/attach.md), but those below it are right."""
    tuners = []
    for again in (False, True):
        model = Gated(again)
        tuners.append(sc.attach(model, sc.SparsityMask({}, {}), train_dense=["embed", "gate"]))
        for _ in range(3):
            for parameter in tuners[-1].parameters():
                parameter.data.add_(0.25)
                parameter.grad = None
            model(IDS).float().square().sum().backward()
    first, second = (t.dense["embed.weight"].grad for t in tuners)
    assert first.any() and torch.equal(first, second)
