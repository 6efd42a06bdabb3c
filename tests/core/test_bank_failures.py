"""AdapterBank when something fails or is interrupted: no bit is lost, and nobody is locked out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import speft_core as sc
from attached import IDS, Net, bits, net, same_bits, some_mask
from speft_core import bank as bank_module
from speft_core.bank import AdapterBank

NAMES = ["left.weight", "right.weight", "norm.bias"]


def adapter(seed: int, dense: bool = False) -> sc.SparseAdapter:
    """An adapter of net() with random values; those of two seeds overlap."""
    model = net()
    tuner = sc.attach(model, some_mask(model, NAMES, density=0.3, seed=seed), train_dense=["out"] if dense else [])
    with torch.no_grad():
        for values in tuner.parameters():
            values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    return tuner.adapter()


def logits(model: Net) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@contextmanager
def doing(model: Net, what: Any) -> Iterator[None]:
    """Within it `what()` is called in the midst of each forward."""
    hook = model.norm.register_forward_hook(lambda *_: what())
    try:
        yield
    finally:
        hook.remove()


def interrupt() -> None:
    raise KeyboardInterrupt


def start(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_adapter_that_does_not_fit_is_refused_whatever_is_asked() -> None:
    model = net()
    before, good = bits(model), adapter(1)
    bank = AdapterBank(model, {"good": good})
    bank.switch("good")
    foreign = {
        "out.bias has shape": sc.SparseAdapter(good.deltas, {"out.bias": torch.zeros(5)}),
        "left.weight has shape": sc.SparseAdapter({"left.weight": sc.SparseDelta(torch.tensor([3]), torch.ones(1), (2, 2))}),
        "no parameter 'nowhere'": sc.SparseAdapter({"nowhere": good.deltas["left.weight"]}),
    }
    for message, one in foreign.items():
        with pytest.raises(sc.UserError, match=message):
            bank.add("wrong", one, check_base=False)
        assert bank.names == ["good"] and bank.active == "good"
    bank.close()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_switch_that_fails_midway_leaves_in_what_was_in(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, bank = bits(model), AdapterBank(model, {"a": adapter(1, dense=True), "b": adapter(2)})
    whole = {}
    for name in ("b", "a"):
        bank.switch(name)
        whole[name] = bits(model)
    left, scatter = [0], bank_module.scatter

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise error
        scatter(*arguments)

    monkeypatch.setattr(bank_module, "scatter", failing)
    for name, writes in (("b", 6), (None, 3)):
        for left[0] in range(writes):
            with pytest.raises(error):
                bank.switch(name)
            assert bank.active == "a" and same_bits(bits(model), whole["a"]) and logits(model) is not None
    left[0] = 99
    bank.switch("b")
    assert same_bits(bits(model), whole["b"])
    bank.close()
    assert same_bits(bits(model), before)


def test_a_base_that_could_not_be_put_back_comes_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, bank = bits(model), AdapterBank(model, {"a": adapter(1, dense=True), "b": adapter(2)})
    scatter, left = bank_module.scatter, [0]

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is gone")
        scatter(*arguments)

    for left[0] in range(6):
        bank.switch("a")
        monkeypatch.setattr(bank_module, "scatter", failing)
        with pytest.raises(RuntimeError):
            bank.switch("b")
        monkeypatch.setattr(bank_module, "scatter", scatter)
        with pytest.raises(sc.UserError, match="restore it before attaching"):
            sc.attach(model, some_mask(model))
        bank.switch(None)
        assert same_bits(bits(model), before)
    assert sc.attach(model, some_mask(model)).trainable_parameters


def test_ctrl_c_within_a_block_locks_nothing() -> None:
    model = net()
    base, bank = logits(model), AdapterBank(model, {"a": adapter(1), "b": adapter(2)})
    with pytest.raises(KeyboardInterrupt), doing(model, interrupt), bank.using("a"):
        logits(model)
    bank.switch("b")
    of_b = logits(model)
    with bank.using("a"):
        with pytest.raises(KeyboardInterrupt), doing(model, interrupt):
            logits(model)
        assert not torch.equal(logits(model), of_b)  # it goes on within the block
        with pytest.raises(sc.UserError, match="leave it before switching"):
            bank.switch(None)
        waiting = start(lambda: bank.switch(None))
        waiting.join(0.2)
        assert waiting.is_alive() and bank.active == "a"
    waiting.join(60)
    assert bank.active is None and torch.equal(logits(model), base)


@pytest.mark.parametrize("then", ["switch", "close", "using", "forward"])
def test_ctrl_c_in_a_forward_locks_nothing(then: str) -> None:
    model = net()
    base, bank = logits(model), AdapterBank(model, {"a": adapter(1)})
    with pytest.raises(KeyboardInterrupt), doing(model, interrupt):
        logits(model)
    if then == "switch":
        bank.switch("a")
        assert not torch.equal(logits(model), base)
    elif then == "close":
        bank.close()
    elif then == "using":
        with bank.using("a"):
            assert not torch.equal(logits(model), base)
    else:
        assert torch.equal(logits(model), base)
    other = start(lambda: bank.add("b", adapter(2)))  # which waits until nobody is inside
    other.join(30)
    assert bank.names[-1] == "b"


def test_others_need_not_wait_for_a_thread_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LOOK_SECONDS", 0.01)
    model = net()
    bank = AdapterBank(model, {"a": adapter(1)})
    with pytest.raises(KeyboardInterrupt), doing(model, interrupt):
        logits(model)
    other = start(lambda: bank.switch("a"))
    other.join(30)  # this thread calls nothing of the bank or the model
    assert bank.active == "a"


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("heir", [None, "waits", "switches"])
def test_a_thread_that_ended_within_a_forward_locks_nothing(shown: bool, heir: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """heir: what a later thread does that was given its number; any number is most often given again at once."""
    monkeypatch.setattr(bank_module, "LOOK_SECONDS", 0.01)
    model = net()
    bank, found, left = AdapterBank(model, {"a": adapter(1)}), bank_module.depth, []
    if not shown:
        monkeypatch.setattr(bank_module, "depth", lambda *asked: 0 if found(*asked) else found(*asked))  # as within torch.compile

    def leave() -> None:
        left.append(len(bank._inside))
        raise SystemExit

    def work() -> None:
        with suppress(SystemExit):  # threading does so too, but pytest hears of it first
            logits(model)

    with doing(model, leave):
        start(work).join(60)
    (number,) = bank._inside
    assert left == [1]
    done, heirs = threading.Event(), []

    def inherit() -> None:
        if threading.get_ident() == number:
            heirs.append(None)
            if heir == "switches":
                bank.switch("a")
        done.wait(60)

    others = [start(inherit) for _ in range(20 if heir else 0)]
    if heir != "switches":
        start(lambda: bank.switch("a")).join(30)
    for other in others:
        other.join(0.05)
    assert bank.active == "a" or (heir == "switches" and not heirs)
    done.set()


def test_a_forward_in_progress_is_not_taken_for_an_interrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LOOK_SECONDS", 0.0005)
    model = net()
    bank = AdapterBank(model, {"a": adapter(1)})
    looked: list[int | None] = []
    found = bank_module.depth
    monkeypatch.setattr(bank_module, "depth", lambda *a: looked.append(found(*a)) or looked[-1])

    def busy() -> None:
        with pytest.raises(sc.UserError, match="leave it before switching"):
            bank.switch("a")
        waiting.append(start(lambda: bank.switch("a")))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            sum(number for number in range(500))
        seen.append(bank.active)
        inner.append(None)
        if len(inner) == 1:  # the model within its own forward, whose end is not that of the outer one
            logits(model)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                seen.append(bank.active)

    waiting: list[threading.Thread] = []
    seen: list[str | None] = []
    inner: list[None] = []
    with doing(model, busy):
        logits(model)
    for thread in waiting:
        thread.join(60)
    assert bank.active == "a" and set(seen) == {None} and len(inner) == 2
    assert {1, 2} <= set(looked)  # the others did look


def test_a_forward_that_a_stack_does_not_show_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(bank_module, "depth", lambda *_: 0)  # as within torch.compile
    model = net()
    bank = AdapterBank(model, {"a": adapter(1)})
    waiting: list[threading.Thread] = []

    def switch_elsewhere() -> None:
        with pytest.raises(sc.UserError, match="leave it before switching"):
            bank.switch("a")
        waiting.append(start(lambda: bank.switch("a")))
        waiting[0].join(0.2)
        assert waiting[0].is_alive() and bank.active is None

    with doing(model, switch_elsewhere):
        logits(model)
    waiting[0].join(60)
    assert bank.active == "a"
    with pytest.raises(KeyboardInterrupt), doing(model, interrupt):
        logits(model)
    logits(model)  # a new forward tells that the last one is over
    bank.switch(None)
    assert bank.active is None


def test_a_batch_within_a_block_or_one_that_fails_puts_back_what_was_in() -> None:
    model = net()
    bank = AdapterBank(model, {"a": adapter(1), "b": adapter(2)})
    answer = model.forward
    model.forward = lambda ids: SimpleNamespace(logits=answer(ids))  # type: ignore[method-assign]
    bank.switch("b")
    rows = bank(["a", None, "a"], ids=IDS)
    assert bank.active == "b"
    with bank.using("a"):
        assert torch.equal(torch.stack(bank(["a"] * 3, ids=IDS)), model(IDS).logits) and bank.active == "a"
        with pytest.raises(sc.UserError, match="leave that before using"):
            bank(["b"], ids=IDS[:1])
    bank.switch("b")
    for error in (IndexError, KeyboardInterrupt):
        def fail(error: type[BaseException] = error) -> None:
            raise error
        with pytest.raises(error), doing(model, fail):
            bank(["a", None, "a"], ids=IDS)
        assert bank.active == "b"
    assert all(torch.equal(one, two) for one, two in zip(rows, bank(["a", None, "a"], ids=IDS), strict=True))


def test_a_bank_that_is_interrupted_while_it_is_made_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, asked = bits(model), []

    def check(self: sc.SparseAdapter, model: Net) -> None:
        asked.append(self)
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sc.SparseAdapter, "check_base", check)
    with pytest.raises(KeyboardInterrupt):
        AdapterBank(model, {"a": adapter(1), "b": adapter(2)})
    assert same_bits(bits(model), before) and not model._forward_hooks and not model._forward_pre_hooks
    assert sc.attach(model, some_mask(model)).trainable_parameters
