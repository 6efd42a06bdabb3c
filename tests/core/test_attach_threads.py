"""Forwards of one attached model in two threads at once, in the orders that hurt: each step waits for the one before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

import speft_core as sc
from attached import bits, oracle_gradients, same_bits, some_mask
from speft_core.slots import standing_in

INPUTS = {name: torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("AB")}


class Steps:
    """An order of named steps that threads keep: `take` waits until all before have been taken."""

    def __init__(self, *names: str) -> None:
        self.taken = {name: threading.Event() for name in names}

    def take(self, name: str) -> None:
        names = list(self.taken)
        before = names[: names.index(name)]
        assert not before or self.taken[before[-1]].wait(30), f"{name} waited in vain"
        self.taken[name].set()


class Waiting(nn.Module):
    """Applies a norm, and reads a weight of a module that it never calls, `inside` between the two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.inner = nn.LayerNorm(6), nn.ModuleDict({"read": nn.Linear(6, 5)})
        self.inside: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        self.inside()
        return functional.linear(y, self.inner["read"].weight, self.inner["read"].bias)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()  # type: ignore[no-any-return]


ORDERS = {
    "first in, first out": ("A in", "B in", "A out", "B out"),
    "one within the other": ("A in", "B in", "B out", "A out"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decided", [False, True])
def test_both_have_their_gradients_and_nothing_stays(order: str, decided: bool) -> None:
    model = Waiting()
    mask, before, attributes = some_mask(model, density=0.5), bits(model), {m: set(vars(m)) for m in model.modules()}
    expected = oracle_gradients(model, mask, lambda m: sum(loss_of(m, x) for x in INPUTS.values()))  # type: ignore[arg-type,return-value]
    tuner = sc.attach(model, mask)
    if decided:
        for _ in range(2):
            loss_of(model, INPUTS["A"]).backward()
        for values_K in tuner.parameters():
            values_K.grad = None
    steps, own = Steps(*ORDERS[order]), threading.local()

    def inside() -> None:
        steps.take(f"{own.name} in")
        if order == "one within the other" and own.name == "A":
            assert steps.taken["B out"].wait(30)
        elif own.name == "A":
            assert steps.taken["B in"].wait(30)
        else:
            assert order != "first in, first out" or steps.taken["A out"].wait(30)

    def forward(name: str) -> torch.Tensor:
        own.name = name
        found = loss_of(model, INPUTS[name])
        steps.take(f"{name} out")
        return found

    model.inside = inside
    with ThreadPoolExecutor(2) as pool:
        losses = [run.result(60) for run in [pool.submit(forward, name) for name in "AB"]]
    for module in model.modules():
        assert all(isinstance(p, nn.Parameter) for p in (getattr(module, n) for n in ("weight", "bias") if hasattr(module, n)))
    for loss in losses:
        loss.backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    tuner.detach()
    del model.inside
    assert same_bits(bits(model), before)
    assert all(set(vars(m)) | {"inside"} == attributes[m] | {"inside"} for m in model.modules())


@pytest.mark.parametrize("order", ["AABB", "ABAB", "ABBA"])
def test_who_leaves_takes_its_own_alone(order: str) -> None:
    module = nn.LayerNorm(6)
    module.mark = "own"
    parameter, taps = module.weight, {name: {"weight": torch.ones(6), "mark": name} for name in "AB"}
    inside: dict[str, object] = {}
    for name in order:
        if name in inside:
            inside.pop(name).__exit__(None, None, None)  # type: ignore[attr-defined]
        else:
            inside[name] = standing_in(module, taps[name])
            inside[name].__enter__()  # type: ignore[attr-defined]
        left = list(inside)[-1] if inside else None
        assert module.weight is (taps[left]["weight"] if left else parameter) and module.mark == (left or "own")
    with standing_in(module, {}), standing_in(module, taps["A"]):
        assert module.mark == "A"
    assert "weight" not in vars(module) and not [n for n in vars(module) if "speft" in n]
