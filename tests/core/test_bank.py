"""AdapterBank: exact switches in place, in any order, and safe against forwards in other threads."""

from __future__ import annotations

import threading

import pytest
import torch

import speft_core as sc
from attached import IDS, Net, bits, net, same_bits, some_mask
from speft_core.bank import AdapterBank


def adapter(seed: int, dtype: torch.dtype = torch.float32, dense: bool = False) -> sc.SparseAdapter:
    """An adapter of net(dtype) with random values; those of two seeds overlap."""
    model = net(dtype)
    names = ["left.weight", "right.weight", "norm.bias"]
    tuner = sc.attach(model, some_mask(model, names, density=0.3, seed=seed), train_dense=["out"] if dense else [])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in tuner.parameters():
            values.add_(torch.randn(values.shape, generator=generator))
    return tuner.adapter()


def logits(model: Net) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_switches_change_no_bit(dtype: torch.dtype) -> None:
    model = net(dtype)
    before = bits(model)
    adapters = {"a": adapter(1, dtype), "b": adapter(2, dtype, dense=True), "c": adapter(3, dtype)}
    expected = {None: logits(model)}
    for name, one in adapters.items():
        with one.applied(model):
            expected[name] = logits(model)
    assert len({float(v.double().sum()) for v in expected.values()}) == 4
    bank = AdapterBank(model)
    bank.add("a", adapters["a"])
    bank.switch("a")
    bank.add("b", adapters["b"])  # while another is in
    bank.add("c", adapters["c"])
    assert bank.active == "a" and torch.equal(logits(model), expected["a"])
    order = [[None, "a", "b", "c"][int(i)] for i in torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(0))]
    for number, name in enumerate(order):
        bank.switch(name)
        if number % 50 == 0:
            assert torch.equal(logits(model), expected[name])
    bank.switch(None)
    assert same_bits(bits(model), before)
    bank.close()
    assert same_bits(bits(model), before) and not model._forward_hooks and not model._forward_pre_hooks


def test_threads_each_see_their_own_adapter_and_none_sees_a_mixture() -> None:
    model = net()
    before, names = bits(model), ["a", "b", None]
    bank = AdapterBank(model)
    bank.add("a", adapter(1))
    bank.add("b", adapter(2))
    expected = {}
    for name in names:
        bank.switch(name)
        expected[name] = logits(model)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(40):
            name = names[(number + turn) % 3]
            with bank.using(name):
                for _ in range(2):
                    if not torch.equal(logits(model), expected[name]):
                        wrong.append((number, turn, name))

    def look() -> None:  # forwards that hold nothing: they may see any adapter, but a whole one
        for _ in range(60):
            found = logits(model)
            if not any(torch.equal(found, one) for one in expected.values()):
                wrong.append("mixture")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        bank.switch(names[turn % 3])
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong
    bank.close()
    assert same_bits(bits(model), before)


def test_a_switch_waits_for_the_forward_in_progress() -> None:
    model = net()
    bank = AdapterBank(model)
    bank.add("a", adapter(1))
    base, inside, go = logits(model), threading.Event(), threading.Event()
    model.norm.register_forward_hook(lambda *_: (inside.set(), go.wait(60), None)[-1])
    found: list[torch.Tensor] = []
    reader = threading.Thread(target=lambda: found.append(logits(model)))
    reader.start()
    assert inside.wait(60)
    writer = threading.Thread(target=lambda: bank.switch("a"))
    writer.start()
    writer.join(timeout=0.2)
    assert writer.is_alive() and bank.active is None
    go.set()
    reader.join(60)
    writer.join(60)
    assert bank.active == "a" and torch.equal(found[0], base)


def test_a_forward_that_fails_locks_nothing() -> None:
    model = net()
    bank = AdapterBank(model)
    bank.add("a", adapter(1))
    with pytest.raises(IndexError):
        model(torch.tensor([[10_000]]))
    bank.switch("a")
    assert bank.active == "a"


def test_mistakes_are_told_and_change_nothing() -> None:
    model = net()
    before, bank = bits(model), AdapterBank(model)
    bank.add("first", adapter(1))
    with pytest.raises(sc.UserError, match="holds an adapter 'first' already"):
        bank.add("first", adapter(2))
    with pytest.raises(sc.UserError, match="no adapter 'frst'; it holds first. Did you mean 'first'"):
        bank.switch("frst")
    other = net(seed=5)
    with pytest.raises(sc.UserError, match="another base"):
        AdapterBank(other).add("x", adapter(1))
    with bank.using("first"):
        with pytest.raises(sc.UserError, match="leave it before switching"):
            bank.switch(None)
        with pytest.raises(sc.UserError, match="using adapter 'first'; leave that"), bank.using(None):
            pass
        with bank.using("first"):
            assert bank.active == "first"
        with pytest.raises(sc.UserError, match="restore it before attaching"):
            sc.attach(model, some_mask(model))
    handle = adapter(2).apply(model, check_base=False)
    with pytest.raises(sc.UserError, match="applied on top"):
        bank.switch(None)
    handle.restore()
    bank.remove("first")
    assert bank.names == [] and bank.active is None and same_bits(bits(model), before)
    tuner = sc.attach(model, some_mask(model))
    with pytest.raises(sc.UserError, match="detach"):
        AdapterBank(model)
    tuner.detach()


def test_a_bank_that_cannot_be_made_leaves_the_model_alone() -> None:
    model = net()
    before = bits(model)
    with pytest.raises(sc.UserError, match="another base"):
        AdapterBank(model, {"a": adapter(1), "other": sc.SparseAdapter({"nowhere": adapter(1).deltas["left.weight"]})})
    assert same_bits(bits(model), before) and not model._forward_hooks and not model._forward_pre_hooks
    with adapter(1).applied(model), pytest.raises(sc.UserError, match="restore it before making a bank"):
        AdapterBank(model)
    bank = AdapterBank(model, {"a": adapter(1)})
    bank.switch("a")
    with sc.SparseAdapter({}).applied(model), pytest.raises(sc.UserError, match="applied on top of the bank's"):
        bank.switch(None)
    bank.remove("a")
    assert bank.active is None and same_bits(bits(model), before) and bank.names == []


def test_any_base_will_do_when_none_is_asked_for() -> None:
    model = net(seed=5)
    with pytest.raises(sc.UserError, match="another base"):
        AdapterBank(model, {"a": adapter(1)})
    bank = AdapterBank(model, {"a": adapter(1), "b": adapter(2)}, check_base=False)
    bank.switch("a")
    bank.remove("b")  # one that is not in
    assert bank.active == "a" and bank.names == ["a"]


def test_a_generation_in_another_thread_does_not_wait_for_those_who_wait_for_it() -> None:
    model = net()
    bank = AdapterBank(model, {"a": adapter(1), "b": adapter(2)})
    with bank.using("b"):
        of_b = logits(model)
    found: dict[str, torch.Tensor] = {}

    def other() -> None:
        with bank.using("b"):
            found["b"] = logits(model)

    with bank.using("a"):
        of_a, waiting = logits(model), threading.Thread(target=other)
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
        worker = threading.Thread(target=lambda: found.setdefault("a", logits(model)))
        worker.start()
        worker.join(60)
        assert not worker.is_alive() and waiting.is_alive()
    waiting.join(60)
    assert torch.equal(found["a"], of_a) and torch.equal(found["b"], of_b) and not torch.equal(of_a, of_b)
    bank.switch(None)
