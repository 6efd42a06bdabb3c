"""Layers that read one input share the blocks that the compiled plan makes of it: the bits are those of each layer alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import speft_core as sc
from attached import some_mask
from speft_core.ops import native
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.recipes import Recipe

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=f"the compiled plan is not there: {native.reason()}")


class Watched:
    """The library, and whether each call had the blocks made: 0, 1, or None for a layer on its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.made = native._load()[0], list[int | None]()
        monkeypatch.setattr(native, "_load", lambda: (self, ""))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def speft_entries(self, *given: Any) -> None:
        """The same, noted."""
        self.made.append(given[9] if given[8] else None)
        assert self.library is not None
        self.library.speft_entries(*given)


class Block(nn.Module):
    """Three layers that read the output of an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(width), requires_grad=False)
        self.q, self.k, self.v = nn.Linear(width, 33), nn.Linear(width, 16), nn.Linear(width, 20)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, width] to a number."""
        scale = hidden.float().pow(2).mean(-1, keepdim=True).rsqrt()
        x = self.norm * (hidden.float() * scale).to(hidden.dtype)
        return self.q(x).sum() + (self.k(x) ** 2).sum() + (self.v(x) * self.v(x)).sum()


def gradients(width: int, tokens: int, dtype: torch.dtype, masks: list[str]) -> dict[str, torch.Tensor]:
    """Of all values, from the same numbers at every call."""
    torch.manual_seed(3)
    model = Block(width).to(dtype)
    tuner = sc.attach(model, some_mask(model, masks, density=0.2), backward="native")
    model(torch.randn(tokens, width).to(dtype).requires_grad_()).backward()
    return {name: values_K.grad for name, values_K in tuner.values.items() if values_K.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 63, 129, 300])
@pytest.mark.parametrize("width", [6, 50])
def test_the_bits_are_those_of_each_layer_alone(
    width: int, tokens: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["q.weight", "k.weight", "v.weight"]
    monkeypatch.setattr(native, "_threads", lambda: threads)
    with monkeypatch.context() as patched:
        watched = Watched(patched)
        shared = gradients(width, tokens, dtype, names)
        assert sorted(watched.made, key=str) == [0, 0, 0, 1]  # v runs twice
        watched.made.clear()
        patched.setattr(native, "SHARED_BYTES", 0)
        alone = gradients(width, tokens, dtype, names)
        assert watched.made == [None] * 4
    assert list(shared) == names
    for name in names:
        assert torch.equal(shared[name], alone[name])


def test_a_layer_that_is_the_only_reader_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    gradients(50, 40, torch.float32, ["k.weight"])
    assert watched.made == [None]


def case(readers: int, tokens: int = 100) -> tuple[Recipe, list[Layout], torch.Tensor, torch.Tensor]:
    """A recipe with so many readers, their layouts, an input and a gradient."""
    layouts = [Layout.of(torch.randperm(20 * 30)[:50].sort().values.to(torch.int32), (20, 30)) for _ in range(readers)]
    recipe = Recipe(torch.Size((tokens, 30)), shared=list(layouts))
    return recipe, layouts, torch.randn(tokens, 30), torch.randn(tokens, 20)


def entries(x_TI: torch.Tensor, grad_TO: torch.Tensor, layout: Layout, recipe: Recipe | None) -> torch.Tensor:
    """By the compiled plan."""
    return native.native_entries(Inputs([(x_TI, x_TI.dtype)], recipe=recipe), grad_TO, layout)


def test_inputs_whose_readers_take_turns_are_not_confused(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, cases = Watched(monkeypatch), [case(2), case(2)]
    for turn in range(2):
        for recipe, layouts, x_TI, grad_TO in cases:
            found_K = entries(x_TI, grad_TO, layouts[turn], recipe)
            assert torch.equal(found_K, entries(x_TI, grad_TO, layouts[turn], None))
    assert watched.made == [1, None] * 4


def test_a_recipe_that_is_gone_leaves_no_blocks_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    for _ in range(5):  # a new object may lie where the old one did
        recipe, layouts, x_TI, grad_TO = case(2)
        entries(x_TI, grad_TO, layouts[0], recipe)
        del recipe
        gc.collect()
    assert watched.made == [1] * 5


@pytest.mark.parametrize("changed", ["tokens", "gradient's dtype", "rounding", "readers", "threads"])
def test_blocks_made_for_something_else_are_made_anew(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, layouts, x_TI, grad_TO = case(2, tokens=300)
    x_TI, grad_TO = x_TI.bfloat16(), grad_TO.bfloat16()
    monkeypatch.setattr(native, "_threads", lambda: 2)
    entries(x_TI, grad_TO, layouts[0], recipe)
    watched = Watched(monkeypatch)
    rounded = x_TI.dtype
    if changed == "tokens":
        x_TI, grad_TO = x_TI[:200], grad_TO[:200]
    elif changed == "gradient's dtype":
        grad_TO = grad_TO.float()
    elif changed == "rounding":
        rounded = torch.float32
    elif changed == "readers":
        recipe.shared.append(case(1)[1][0])
    else:
        monkeypatch.setattr(native, "_threads", lambda: 1)
    found_K = native.native_entries(Inputs([(x_TI, rounded)], recipe=recipe), grad_TO, layouts[1])
    alone_K = native.native_entries(Inputs([(x_TI, rounded)]), grad_TO, layouts[1])
    assert torch.equal(found_K, alone_K) and watched.made == [1, None]


def test_layouts_are_known_by_themselves_and_not_by_their_number() -> None:
    recipe, layouts, x_TI, grad_TO = case(2)
    before = native.pattern_of_all(layouts[0], recipe.shared, 30)
    assert native.pattern_of_all(layouts[0], list(recipe.shared), 30) is before
    other = case(2)[1][0]
    after = native.pattern_of_all(layouts[0], [layouts[0], other], 30)
    assert after is not before
    assert torch.equal(after._tensors[2], torch.cat([layouts[0].cols_C, other.cols_C]).unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_the_blocks_stay_within_the_bytes_asked_for(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, layouts, x_TI, grad_TO = case(2, tokens)
    room: list[torch.Tensor] = []

    def blocks(size: int, *_: object) -> tuple[int, int]:
        room.append(torch.full((size + 64,), 7, dtype=torch.uint8))
        return room[0].data_ptr(), 1

    monkeypatch.setattr(native, "_blocks", blocks)
    monkeypatch.setattr(native, "_threads", lambda: 2)
    entries(x_TI.to(dtype), grad_TO.to(dtype), layouts[0], recipe)
    assert bool((room[0][-64:] == 7).all()) and not bool((room[0][:-64] == 7).all())


def test_backward_twice_adds_the_same_again() -> None:
    model = Block(50)
    tuner = sc.attach(model, some_mask(model, ["q.weight", "k.weight"], density=0.2), backward="native")
    loss = model(torch.randn(40, 50, requires_grad=True))
    loss.backward(retain_graph=True)
    once = {name: values_K.grad.clone() for name, values_K in tuner.values.items() if values_K.grad is not None}
    loss.backward()
    for name, values_K in tuner.values.items():
        assert torch.equal(values_K.grad, 2 * once[name])
