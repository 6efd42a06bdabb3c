"""Forwards without gradients before it is known who reads what: the outermost writes for those within it, and none reads old values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import speft_core as sc
from attached import IDS, loss_of, some_mask

X = torch.randn(2, 12, generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    """Calls a norm and reads a weight within `inner` without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(12), nn.ModuleDict({"read": nn.Linear(12, 12)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(functional.linear(self.norm(x), self.inner["read"].weight))


class Net(nn.Module):
    """Two blocks, perhaps computed again in backward."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again, self.embed, self.head = again, nn.Embedding(31, 12), nn.Linear(12, 31)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.again else block(x)
        return self.head(x)  # type: ignore[no-any-return]


NAMES = [f"blocks.{n}.{part}.weight" for n in (0, 1) for part in ("norm", "inner.read")]
EMBEDDED = [*NAMES, "embed.weight"]


def written(tuner: sc.Tuner, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are written for from here on."""
    seen: list[nn.Module] = []
    write = tuner.outside._write
    monkeypatch.setattr(tuner.outside, "_write", lambda module: (seen.append(module), write(module)))
    return seen


def update(tuner: sc.Tuner) -> None:
    with torch.no_grad():
        for values_K in tuner.parameters():
            assert values_K.grad is not None
            values_K -= 0.5 * values_K.grad
            values_K.grad = None


def test_the_outermost_forward_alone_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    seen = written(sc.attach(model, some_mask(model, NAMES)), monkeypatch)
    with torch.no_grad():
        for _ in range(2):
            model(IDS)
        model.blocks[1](X)
    assert seen == [model, model, model.blocks[1]]


def test_within_a_forward_with_gradients_those_without_write_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(again=True)
    seen = written(sc.attach(model, some_mask(model, EMBEDDED)), monkeypatch)
    loss_of(model)
    assert seen == list(model.blocks)


def test_a_step_within_a_forward_is_seen_by_what_comes_after_it() -> None:
    model, plain = Net(), Net()
    tuner = sc.attach(model, some_mask(model, [n for n in NAMES if "blocks.1" in n], density=0.5))
    found: list[torch.Tensor] = []

    def step(*_: Any) -> None:
        with torch.enable_grad():
            model.blocks[1](X).square().sum().backward()
        update(tuner)

    model.blocks[0].register_forward_hook(step)
    model.blocks[1].register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    model.blocks[1].register_forward_hook(lambda _module, _args, output: found.append(output))
    with torch.no_grad():
        model(IDS)
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        _, of_step, x, after = found
        assert torch.equal(after, plain.blocks[1](x))
        assert not torch.equal(of_step, plain.blocks[1](X))  # something was trained


def test_a_forward_that_was_interrupted_wrote_for_no_other_part() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model, plain = Net(), Net()
    tuner = sc.attach(model, some_mask(model, NAMES, density=0.5))
    loss_of(model).backward()
    with torch.no_grad():
        before = model.blocks[1](X)
        model.blocks[0].norm.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
        with pytest.raises(KeyboardInterrupt):
            model.blocks[0](X)
        update(tuner)
        found = model.blocks[1](X)
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(found, plain.blocks[1](X)) and not torch.equal(found, before)
