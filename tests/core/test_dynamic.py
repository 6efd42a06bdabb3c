"""Masks that change while training: what was learned stays bit for bit, and a killed run resumes on the very same path."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pico
import speft_core as sc
from speft_core.targets import base_parameters

STEPS = 24
BUDGET = sc.Budget(k=60)
Bits = dict[str, torch.Tensor]


def bits(model: nn.Module) -> Bits:
    return {n: p.detach().clone() for n, p in base_parameters(model).items()}


def same(left: Bits, right: Bits) -> bool:
    as_bytes = [{n: t.contiguous().view(torch.uint8) for n, t in side.items()} for side in (left, right)]
    return left.keys() == right.keys() and all(torch.equal(t, as_bytes[1][n]) for n, t in as_bytes[0].items())


class Killed(Exception):
    """Stands for a process that dies."""


class Run:
    """A training loop with checkpoints every 5 steps, as any trainer has it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.folder = folder
        self.model = pico.llama(dtype=dtype)
        self.base = bits(self.model)
        self.kill_in_change: int | None = None
        batches = [pico.batch(self.model, seed=99)]
        mask = sc.find_mask(self.model, batches, budget=BUDGET)
        self.tuner = sc.attach(self.model, mask, keep_empty=True)
        self.optimizer = torch.optim.AdamW(self.tuner.parameters(), lr=0.02)
        settings = {"interval": 7, **settings}
        self.dynamic = sc.DynamicMask(tuner=self.tuner, batches=self.fresh, **settings)
        self.start = 0

    def fresh(self, number: int) -> Any:
        for part in range(3):
            if self.kill_in_change == number and part == 2:
                raise Killed
            yield pico.batch(self.model, seed=1000 * number + part)

    def train(self, kill_after: int | None = None) -> Run:
        for step in range(self.start, STEPS):
            self.model(**pico.batch(self.model, seed=step)).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.dynamic.after_step(self.optimizer)
            if step % 5 == 4:
                state = {"dynamic": self.dynamic.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step + 1}
                torch.save(state, self.folder / "checkpoint.pt")
            if kill_after == step + 1:
                raise Killed
        return self

    def resume(self) -> Run:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.dynamic.load_state_dict(state["dynamic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.start = state["step"]
        return self


SETTINGS: list[dict[str, Any]] = [
    {},
    {"optimizer_state": "keep"},
    {"policy": "grow_and_drop"},
    {"policy": "grow_and_drop", "optimizer_state": "keep"},
    {"scope": "local", "metric": "snip"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("where", ["between", "inside"])
def test_killed_and_resumed_is_bit_identical(settings: dict[str, Any], where: str, tmp_path: Path) -> None:
    alone = Run(tmp_path, **settings).train()
    assert len(alone.dynamic.changes) == 3
    killed = Run(tmp_path, **settings)
    if where == "inside":
        killed.kill_in_change = 2
    with pytest.raises(Killed):
        killed.train(kill_after=12 if where == "between" else None)
    assert (killed.dynamic.steps, len(killed.dynamic.changes)) == ((12, 1) if where == "between" else (14, 1))
    resumed = Run(tmp_path, **settings).resume().train()
    assert same(bits(resumed.model), bits(alone.model))
    assert resumed.dynamic.report() == alone.dynamic.report()
    assert resumed.tuner.mask == alone.tuner.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_base_and_adapter_give_the_final_weights(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(tmp_path, dtype=dtype, **settings).train()
    adapter = run.tuner.adapter()
    final = bits(run.model)
    report = run.dynamic.report()
    assert adapter.nnz == report["union"] >= report["active"] == BUDGET.k
    if settings.get("policy") == "grow_and_drop":
        assert report["union"] == BUDGET.k
    else:
        assert report["union"] > BUDGET.k
        assert run.tuner.parked
    adapter.save(tmp_path / "adapter")
    run.tuner.detach()
    assert same(bits(run.model), run.base)
    with sc.SparseAdapter.load(tmp_path / "adapter").applied(run.model):
        assert same(bits(run.model), final)
    assert same(bits(run.model), run.base)
    assert all(n == report["changes"][i]["step"] for i, n in enumerate([7, 14, 21]))
    assert all(0 <= c["overlap"] < 1 for c in report["changes"])


def test_fp32_values_are_not_rounded_by_a_change(tmp_path: Path) -> None:
    """bf16 weights: an entry that rests and comes back goes on from its fp32 change."""
    run = Run(tmp_path, dtype=torch.bfloat16)
    first = run.tuner.mask
    for values in run.tuner.values.values():
        values.data.fill_(1e-4)
    other = sc.find_mask(run.model, metric="random", budget=BUDGET, seed=3)
    run.tuner.remask(other)
    run.tuner.remask(first)
    for name, values in run.tuner.values.items():
        assert torch.equal(values, torch.full_like(values, 1e-4)), name
    assert all(p.values_P.numel() == 0 for p in run.tuner.parked.values())


def test_a_change_does_not_move_the_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for seed in range(3):
        run.model(**pico.batch(run.model, seed=seed)).loss.backward()
        run.optimizer.step()
    run.tuner.sync()
    before = bits(run.model)
    run.dynamic.change(run.optimizer)
    assert same(bits(run.model), before)
    assert run.tuner.mask.nnz == BUDGET.k
    assert not run.optimizer.state


def test_surviving_entries_keep_their_optimizer_state(tmp_path: Path) -> None:
    run = Run(tmp_path, optimizer_state="keep")
    run.model(**pico.batch(run.model)).loss.backward()
    run.optimizer.step()
    before = {n: run.optimizer.state[p]["exp_avg"].clone() for n, p in run.tuner.values.items()}
    old = run.tuner.mask
    run.dynamic.change(run.optimizer)
    seen = 0
    for name, values in run.tuner.values.items():
        moved = run.optimizer.state[values]["exp_avg"]
        where = {int(i): float(v) for i, v in zip(old.indices[name], before[name], strict=True)}
        assert moved.tolist() == [where.get(int(i), 0.0) for i in run.tuner.mask.indices[name]]
        seen += sum(int(i) in where for i in run.tuner.mask.indices[name])
    assert 0 < seen < BUDGET.k  # some survived, some are new


def test_final_budget_prunes_the_union_and_says_what_it_costs(tmp_path: Path) -> None:
    run = Run(tmp_path).train()
    whole = run.dynamic.report()["union"]
    assert BUDGET.k is not None
    cost = run.dynamic.prune(BUDGET.k, run.optimizer)
    assert cost["kept"] == BUDGET.k
    assert cost["dropped"] == whole - BUDGET.k > 0
    assert 0 < cost["lost"] < 1
    adapter = run.tuner.adapter()
    assert adapter.nnz == BUDGET.k
    final = bits(run.model)
    run.tuner.detach()
    with adapter.applied(run.model):
        assert same(bits(run.model), final)


def test_training_after_a_change_equals_a_dense_model_with_its_gradient_masked(tmp_path: Path) -> None:
    run = Run(tmp_path, interval=4)
    twin = copy.deepcopy(pico.llama())
    for step in range(8):
        batch = pico.batch(run.model, seed=step)
        masks = {n: i.long() for n, i in run.tuner.mask.indices.items()}
        loss = run.model(**batch).loss
        loss.backward()
        dense = twin(**batch).loss
        twin.zero_grad()
        dense.backward()
        assert loss.item() == pytest.approx(dense.item(), abs=1e-5)
        parameters = dict(twin.named_parameters())
        for name, values in run.tuner.values.items():  # plain gradient descent on both, the very same entries
            with torch.no_grad():
                values -= 0.1 * values.grad
                values.grad = None
                flat = parameters[name].view(-1)
                flat[masks[name]] -= 0.1 * parameters[name].grad.view(-1)[masks[name]]
        run.dynamic.after_step(run.optimizer)
    run.tuner.sync()
    for name, parameter in bits(run.model).items():
        assert torch.allclose(parameter, dict(twin.named_parameters())[name], atol=1e-5), name
    assert len(run.dynamic.changes) == 2


def test_a_mask_of_any_tensor_can_change_without_an_optimizer() -> None:
    """Norms are trained through a tap, which has no layout to make anew."""
    model = pico.llama()
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    masks = [sc.find_mask(model, metric="random", budget=sc.Budget(k=24), targets=names, seed=s, scope="local") for s in (1, 2)]
    assert all(m.indices[n].numel() for m in masks for n in names)
    before, batch = bits(model), pico.batch(model)
    tuner = sc.attach(model, masks[0])
    for mask in (masks[1], masks[0], None):
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)
        model(**batch).loss.backward()
        assert all(v.grad is not None and v.grad.numel() == tuner.mask.indices[n].numel() for n, v in tuner.values.items())
        optimizer.step()
        if mask is not None:
            tuner.remask(mask)
    union = {n: set(masks[0].indices[n].tolist()) | set(masks[1].indices[n].tolist()) for n in names}
    adapter, final = tuner.adapter(), bits(model)
    assert {n: set(adapter.deltas[n].indices_K.tolist()) for n in names} == union
    tuner.detach()
    assert same(bits(model), before)
    with adapter.applied(model):
        assert same(bits(model), final)


def test_bad_settings(tmp_path: Path) -> None:
    for settings, rule in [
        ({"policy": "rescoer"}, "Did you mean 'rescore'"),
        ({"interval": 0}, "at least 1 optimizer step"),
        ({"optimizer_state": "reset"}, "one of clear, keep"),
        ({"swap": 0.0}, r"swap must lie in \(0, 1\]"),
    ]:
        with pytest.raises(sc.UserError, match=rule):
            Run(tmp_path, **settings)
    run = Run(tmp_path)
    with pytest.raises(sc.UserError, match="must cover the tuner's parameters"):
        run.tuner.remask(sc.find_mask(pico.llama(), metric="magnitude", targets=["q_proj"]))
    mask = run.tuner.mask
    with pytest.raises(sc.UserError, match="must have the shapes of the tuner's parameters"):
        run.tuner.remask(sc.SparsityMask(mask.indices, {n: (s[0] * s[1],) for n, s in mask.shapes.items()}))
    state = run.dynamic.state_dict()
    other = {k.replace("layers.0", "layers.9"): v for k, v in state["tensors"].items()}
    with pytest.raises(sc.UserError, match="the saved dynamic mask is of other targets: .*layers.0"):
        run.dynamic.load_state_dict({**state, "tensors": other})
    with pytest.raises(sc.UserError, match="final_budget must be"):
        run.dynamic.prune(0)


def test_a_loaded_state_moves_resting_entries_too() -> None:
    model = pico.llama()
    base, batches = bits(model), [pico.batch(model, seed=99)]
    first = sc.find_mask(model, batches, budget=BUDGET)
    second = sc.find_mask(model, metric="random", budget=BUDGET)
    tuner = sc.attach(model, first, keep_empty=True)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)

    def steps() -> None:
        for seed in range(3):
            model(**pico.batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.state.clear()

    steps()
    best = {k: v.clone() for k, v in model.state_dict().items()}
    steps()
    tuner.remask(second)
    steps()
    model.load_state_dict(best)
    logits = model(**batches[0]).logits
    adapter = tuner.adapter()
    assert torch.equal(model(**batches[0]).logits, logits)
    tuner.detach()
    assert same(bits(model), base)
    with adapter.applied(model):
        torch.testing.assert_close(model(**batches[0]).logits, logits)
    other = pico.llama()
    tuner = sc.attach(other, first, keep_empty=True)
    tuner.remask(second)
    other.load_state_dict({k: base.get(k, v) for k, v in other.state_dict().items()})
    assert not any(d.values_K.any() for d in tuner.adapter().deltas.values())
