"""Parameters written at once when a training forward begins: every layer finds base + values, whatever came between."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pico
import speft_core as sc
from attached import loss_of, net, some_mask, train
from speft_core import writing
from speft_core.ops import native

needs_compiler = pytest.mark.skipif(bool(native.reason()), reason=f"the compiled plan is not there: {native.reason()}")


class Runs:
    """How many tensors each call of the compiled writes took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        run = native.Changes.run

        def counted(changes: native.Changes, what: str) -> None:
            self.counts.append(len(changes._tensors))
            run(changes, what)

        monkeypatch.setattr(native.Changes, "run", counted)


def holds(tuner: sc.Tuner, name: str) -> bool:
    """Whether the weight holds base + values."""
    slot = tuner._slots[name][0]
    return torch.equal(writing.gather(slot.weight, slot.indices_K), writing.add_values(slot.base_K, slot.values_K))


class Experts(nn.Module):
    """A first layer, then one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, expert: str) -> torch.Tensor:
        """[..., 8] to [..., 8]."""
        y: torch.Tensor = getattr(self, expert)(self.first(x))
        return y


def experts() -> tuple[Experts, sc.Tuner, torch.Tensor]:
    """The model, attached, and an input; values are not zero."""
    model = Experts()
    tuner = sc.attach(model, some_mask(model, ["first.weight", "one.weight", "other.weight"], density=0.5))
    for values_K in tuner.values.values():
        values_K.data.normal_()
    return model, tuner, torch.randn(3, 8)


@needs_compiler
def test_a_training_forward_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama().train()
    tuner = sc.attach(model, sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=200), scope="local"))
    batch = pico.batch(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    runs = Runs(monkeypatch)
    for _ in range(3):
        runs.counts.clear()
        model(**batch).loss.backward()
        assert runs.counts == [len(tuner.values)]
        assert all(holds(tuner, name) for name in tuner.values)
        optimizer.step()
    with torch.no_grad():
        model(**batch)
    assert all(holds(tuner, name) for name in tuner.values)


def test_without_the_compiled_loop_each_layer_writes_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "off for this test"))
    model, tuner, x = experts()
    tuner.outside.remove()  # which writes what a module above might read
    model(x, "one")
    assert holds(tuner, "first.weight") and holds(tuner, "one.weight") and not holds(tuner, "other.weight")


def by_engine(tuner: sc.Tuner) -> None:
    """An update that leaves no trace, as DeepSpeed's, which follows a backward."""
    tuner.values["other.weight"].data.mul_(-3)


def by_optimizer(tuner: sc.Tuner) -> None:
    """An update that its version tells of."""
    with torch.no_grad():
        tuner.values["other.weight"].mul_(-3)


@pytest.mark.parametrize(("update", "with_backward"), [(by_engine, True), (by_optimizer, True), (by_optimizer, False)])
def test_a_layer_that_a_pass_went_round_finds_later_updates(update: Callable[[sc.Tuner], None], with_backward: bool) -> None:
    model, tuner, x = experts()
    model(x, "one")  # the first one writes for all
    loss = model(x, "one").sum()
    if with_backward:
        loss.backward()
    update(tuner)
    hidden = torch.randn(3, 8)
    expected = nn.functional.linear(hidden, dense(tuner, "other.weight"), model.other.bias)
    assert torch.equal(model.other(hidden), expected)


def test_a_backward_of_a_tap_alone_is_one_too() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    tuner = sc.attach(model, some_mask(model, ["0.weight", "1.weight"], density=0.5))
    model[0](torch.randn(3, 8)).sum().backward()
    tuner.values["1.weight"].data.normal_()  # by an engine
    model[1](torch.randn(3, 8))
    assert holds(tuner, "1.weight")


def dense(tuner: sc.Tuner, name: str) -> torch.Tensor:
    """base + values, in a copy of the weight."""
    slot = tuner._slots[name][0]
    weight = slot.weight.detach().clone()
    writing.write_sum(weight, slot.indices_K, slot.base_K, slot.values_K)
    return weight


def test_a_weight_that_was_exchanged_between_gets_its_values() -> None:
    model, tuner, x = experts()
    model(x, "one")
    slot = tuner._slots["other.weight"][0]
    base = slot.weight.detach().clone()
    writing.scatter(base, slot.indices_K, slot.base_K)
    slot.weight.data = base
    model.other(x)
    assert holds(tuner, "other.weight")


@needs_compiler
def test_recomputed_layers_do_not_write_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama().train()
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=200), scope="local")
    model.activation_checkpointing_enable({"use_reentrant": False})
    tuner = sc.attach(model, mask)
    batch = pico.batch(model)
    model(**batch).loss.backward()
    runs = Runs(monkeypatch)
    model(**batch).loss.backward()
    assert sum(runs.counts) <= 3 * len(tuner.values)  # all at once, each for itself, and the first layer for all once more


def test_no_layer_looks_at_the_weights_of_another_where_they_lie_in_shards() -> None:
    """With ZeRO-3 a look gathers them, and the whole model would be here at once."""
    model, tuner, x = experts()
    for name in tuner.values:
        weight: Any = model.get_parameter(name)
        weight.ds_id, weight.ds_status = 0, types.SimpleNamespace(name="AVAILABLE")

    class Watched(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            looked.append(key)
            return super().__getitem__(key)

    looked: list[str] = []
    model.other._parameters = Watched(model.other._parameters)
    model(x, "one").sum().backward()
    assert not looked and holds(tuner, "first.weight") and holds(tuner, "one.weight")
    model.other(x)
    assert looked and holds(tuner, "other.weight")


@needs_compiler
def test_a_tied_weight_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.left, model.right = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model.right.weight = model.left.weight
    tuner = sc.attach(model, some_mask(model, ["left.weight"], density=0.5))
    assert len(tuner._slots["left.weight"]) == 2
    tuner.values["left.weight"].data.normal_()
    runs, x = Runs(monkeypatch), torch.randn(2, 8)
    y = model.right(model.left(x))
    assert runs.counts == [1] and holds(tuner, "left.weight")
    weight = dense(tuner, "left.weight")
    assert torch.equal(y, nn.functional.linear(nn.functional.linear(x, weight), weight))


@needs_compiler
def test_after_a_change_of_mask_the_new_entries_are_written() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model), keep_empty=True)
    train(tuner, model, 2)
    tuner.remask(some_mask(net(), seed=7))
    train(tuner, model, 1)
    for values_K in tuner.values.values():
        values_K.data.add_(0.5)
    loss_of(model)
    assert all(holds(tuner, name) for name in tuner.values)
