"""attach and detach when something fails or is interrupted midway, and when the model has moved to another device since."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import speft_core as sc
from attached import IDS, LINEAR, Net, bits, loss_of, net, same_bits, some_mask, train
from speft_core import writing
from speft_core.remask import union

attach_module, remask_module, slots_module = (importlib.import_module(f"speft_core.{n}") for n in ("attach", "remask", "slots"))
NAMES = ["left.weight", "right.weight", "norm.bias"]


def assert_as_new(model: Net, before: dict[str, torch.Tensor]) -> None:
    """No trace of a tuner: tensors, hooks, forwards, what wants a gradient."""
    assert same_bits(bits(model), before)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"embed.weight"}
    assert {n for n, _ in model.named_parameters()} == set(before) and not list(model.named_buffers())
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)
        assert "forward" not in vars(module) and not any(hooks) and not module._non_persistent_buffers_set
    assert not hasattr(model, "_speft_tuner")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "what", "nth"),
    [(attach_module, "fingerprint", 0), (attach_module, "fingerprint", 2), (slots_module, "gather", 0), (slots_module, "gather", 2),
     (attach_module, "WholeSlot", 1), (attach_module, "AttachedForward", 2), (attach_module, "Outside", 0)],
)  # fmt: skip
def test_an_attach_that_fails_midway_leaves_no_trace(
    error: type[BaseException], where: Any, what: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(torch.bfloat16)
    model.embed.weight.requires_grad_(False)
    before, mask, real, calls = bits(model), some_mask(model, NAMES), getattr(where, what), [0]

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth + 1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(where, what, failing)
    with pytest.raises(error):
        sc.attach(model, mask, train_dense=["out"])
    assert_as_new(model, before)
    tuner = sc.attach(model, mask, train_dense=["out"])
    train(tuner, model, 2)
    assert not same_bits(bits(model), before)
    tuner.detach()
    assert_as_new(model, before)


def parked_tuner(model: Net) -> sc.Tuner:
    """A tuner some of whose entries rest."""
    tuner = sc.attach(model, some_mask(model, NAMES), train_dense=["out"])
    train(tuner, model, 3)
    tuner.remask(some_mask(model, NAMES, seed=1))
    train(tuner, model, 3)
    assert set(tuner.parked) == set(NAMES)
    return tuner


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_detach_that_fails_can_be_called_again(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    model.embed.weight.requires_grad_(False)
    before, scatter, left = bits(model), remask_module.scatter, [0]

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        scatter(*arguments)

    tuner = parked_tuner(model)
    values = {n: v.detach().clone() for n, v in tuner.values.items()}
    monkeypatch.setattr(remask_module, "scatter", failing)
    for left[0] in range(6):
        with pytest.raises(error):
            tuner.detach()
        assert model._speft_tuner is tuner and set(tuner.parked) == set(NAMES)
        with torch.no_grad():
            model(IDS)  # the forwards are there, and write what trains again
        for name, slots in tuner._slots.items():
            adapted_K = writing.add_values(slots[0].base_K, values[name])
            assert torch.equal(writing.gather(slots[0].weight, slots[0].indices_K), adapted_K)
    monkeypatch.setattr(remask_module, "scatter", scatter)
    tuner.detach()
    tuner.detach()
    assert_as_new(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_detach_that_fails_leaves_what_trains_what_rests_and_dense_parts(
    dtype: torch.dtype, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(dtype)
    model.embed.weight.requires_grad_(False)
    before, scatter, left = bits(model), remask_module.scatter, [0]
    tuner = parked_tuner(model)
    loss_of(model).backward()
    trained, gradients = bits(model), {n: p.grad.clone() for n, p in tuner.dense.items() if p.grad is not None}
    with torch.no_grad():
        answer = model(IDS)

    class Failing(torch.Tensor):
        """What a dense part held before, until it is read."""

        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise error

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise error
        scatter(*arguments)

    def fails() -> None:
        with pytest.raises(error):
            tuner.detach()
        assert model._speft_tuner is tuner and same_bits(bits(model), trained)
        assert set(gradients) == {"out.weight", "out.bias"} and all(torch.equal(tuner.dense[n].grad, g) for n, g in gradients.items())
        with torch.no_grad():
            assert torch.equal(model(IDS), answer)

    monkeypatch.setattr(remask_module, "scatter", failing)
    for left[0] in range(6):
        fails()
    for name, saved in list(tuner._dense_before.items()):
        tuner._dense_before[name] = saved.as_subclass(Failing)
        fails()
        tuner._dense_before[name] = saved
    tuner.detach()
    assert_as_new(model, before)


class Devices:
    """Stands before the operators that write and read; each must be given tensors of one device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for what, operator in writing.PLAIN.items():
            monkeypatch.setitem(writing.PLAIN, what, lambda *change, run=operator: self.check(change) or run(*change))

    def check(self, change: tuple[torch.Tensor | None, ...]) -> None:
        (device,) = {t.device.type for t in change if t is not None}
        self.seen.append(device)


def test_a_model_that_moved_gets_its_bits_back_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    tuner, devices = parked_tuner(model), Devices(monkeypatch)
    model.to("meta")
    for name in NAMES:
        assert {t.device.type for t in union(tuner, name)} == {"meta"}
        moved = tuner.parked[name].loaded_from(tuner._slots[name][0].weight)
        assert {moved.indices_P.device.type, moved.values_P.device.type, moved.base_P.device.type} == {"meta"}
    devices.seen.clear()
    tuner.detach()
    assert devices.seen.count("meta") >= 6 and "cpu" not in devices.seen


def test_a_bank_follows_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model, NAMES), train_dense=["out"])
    train(tuner, model, 2)
    adapter = tuner.adapter()
    tuner.detach()
    bank, devices = sc.AdapterBank(model, {"a": adapter}), Devices(monkeypatch)
    bank.switch("a")
    model.to("meta")
    devices.seen.clear()
    for name in (None, "a", None):
        bank.switch(name)
    assert devices.seen == ["meta"] * 9


@pytest.mark.parametrize("how", ["int64", "strided", "both"])
def test_a_mask_from_a_file_takes_the_state_of_the_one_that_was_saved(how: str, tmp_path: Path) -> None:
    plain = some_mask(net(), LINEAR)
    given = {n: i if how == "strided" else i.long() for n, i in plain.indices.items()}
    if how != "int64":
        given = {n: torch.stack([i, i], 1)[:, 0] for n, i in given.items()}
        assert not any(i.is_contiguous() for i in given.values())
    mask = sc.SparsityMask(given, plain.shapes)
    mask.save(tmp_path / "mask.safetensors")
    model = net()
    tuner = sc.attach(model, mask)
    train(tuner, model, 2)
    state = {key: tensor.clone() for key, tensor in tuner.state_dict().items()}
    again = sc.attach(net(), sc.SparsityMask.load(tmp_path / "mask.safetensors"))
    again.load_state_dict(state)
    assert all(torch.equal(v, again.values[n]) and v.any() for n, v in tuner.values.items())
    with pytest.raises(sc.UserError, match="the same sizes, but other entries"):
        sc.attach(net(), some_mask(net(), LINEAR, seed=1)).load_state_dict(state)


def test_a_state_of_int64_indices_that_an_earlier_version_wrote_is_taken() -> None:
    tuner, digest = sc.attach(net(), some_mask(net(), LINEAR)), hashlib.blake2b(digest_size=8)
    for name, indices_K in tuner.mask.indices.items():
        digest.update(name.encode() + b"\0" + indices_K.numpy().astype("<i8").tobytes())
    mask = torch.tensor(list(digest.digest()), dtype=torch.float32)
    tuner.load_state_dict({**{f"values.{n}": torch.ones_like(v) for n, v in tuner.values.items()}, "mask": mask})
    assert all(bool((v == 1).all()) for v in tuner.values.values())
