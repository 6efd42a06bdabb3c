"""Inputs that were changed in place have no recipe, whoever changed them; those of ordinary models never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pico
import speft_core as sc
from attached import oracle_gradients, some_mask
from speft_core import slots
from speft_core.ops.recipes import Recipe, recipe_of

PADDING = torch.tensor([[False, False, True, True, True], [False, True, False, False, True]])


def zeroed(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x[PADDING if x.shape[:2] == PADDING.shape else PADDING.T] = 0
    return x


CHANGED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "product": lambda a, b: zeroed(functional.silu(a) * b),
    "scaled product": lambda a, b: zeroed(torch.ones(8) * (a * b)),
    "view": lambda a, b: zeroed(a * b).view(10, 8),
    "beneath a view": lambda a, b: (y := a * b, y.view(10, 8), zeroed(y))[1],
    "copy": lambda a, b: zeroed((torch.tanh(a) + 0 * b).tanh().clone()),
    "copy, copied": lambda a, b: zeroed((a * b).tanh().clone()).transpose(0, 1).reshape(10, 8),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_without_grad_reaches_the_gradient(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.down = nn.Linear(8, 6)
            self.a, self.b = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))

        def forward(self) -> torch.Tensor:
            return self.down(CHANGED[name](self.a, self.b)).square().sum()

    model = Model()
    mask = some_mask(model, ["down.weight"], density=0.5)
    expected = oracle_gradients(model, mask, lambda m: m())
    tuner = sc.attach(model, mask)
    model().backward()
    torch.testing.assert_close(tuner.values["down.weight"].grad, expected["down.weight"], rtol=1e-5, atol=1e-6)


def test_one_copy_of_a_saved_output_is_trusted() -> None:
    x = torch.tanh(torch.randn(2, 5, 8, requires_grad=True))
    assert recipe_of(x.clone()) is not None and recipe_of(x.transpose(0, 1).reshape(10, 8)) is not None
    assert recipe_of(x.clone().clone()) is None


@pytest.mark.parametrize("name", pico.MODELS)
def test_no_input_of_an_ordinary_model_was_changed_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[int] = []

    def looking(x: torch.Tensor) -> Recipe | None:
        versions.append(x._version)
        return recipe_of(x)

    monkeypatch.setattr(slots, "recipe_of", looking)
    model: Any = pico.MODELS[name]().train()
    sc.attach(model, some_mask(model, [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]))
    model(**pico.batch(model)).loss.backward()
    assert versions.count(0) == len(versions) > 0 or name == "gpt2"  # whose layers are of a kind of their own


def test_a_llamas_layers_have_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Recipe | None] = []
    monkeypatch.setattr(slots, "recipe_of", lambda x: found.append(recipe_of(x)) or found[-1])
    model = pico.llama().train()
    sc.attach(model, some_mask(model, [n for n, _ in model.named_parameters() if "proj" in n]))
    batch = pico.batch(model)
    batch["attention_mask"].fill_(1)
    model(**batch).loss.backward()
    assert len(found) == 7 * pico.LAYERS and found[:3] == [None] * 3  # the first layer's input has no gradient and is kept
    assert None not in found[3:]
