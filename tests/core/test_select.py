"""Exact streaming selection: against sorting, with ties, bounds, streams and scores that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core import UserError
from speft_core import select as module
from speft_core.select import LazyScores, kth_largest, select, select_topk

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
TENSORS = st.lists(st.lists(st.one_of(FLOATS, st.sampled_from([0.0, -0.0, 1.0, -1.0])), max_size=30), min_size=1, max_size=4)


def as_scores(rows: list[list[float]]) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.tensor(row, dtype=torch.float32) for number, row in enumerate(rows)}


def sorted_choice(scores: dict[str, torch.Tensor], k: int) -> dict[str, list[int]]:
    """The plain definition: all entries sorted by score, then tensor, then index."""
    entries = [(-float(v), t, i) for t, x in enumerate(scores.values()) for i, v in enumerate(x.reshape(-1))]
    kept = sorted(entries)[:k]
    return {name: sorted(i for _, t, i in kept if t == number) for number, name in enumerate(scores)}


@given(TENSORS, st.data())
def test_equals_sorting_everything(rows: list[list[float]], data: st.DataObject) -> None:
    scores = as_scores(rows)
    k = data.draw(st.integers(0, sum(len(r) for r in rows)))
    assert {n: i.tolist() for n, i in select_topk(scores, k).items()} == sorted_choice(scores, k)


@given(TENSORS, st.data())
def test_chunks_of_a_stream_are_one_tensor(rows: list[list[float]], data: st.DataObject) -> None:
    whole = as_scores([[v for row in rows for v in row]])
    count = whole["t0"].numel()
    if count == 0:
        return
    k = data.draw(st.integers(1, count))
    found = select_topk(lambda: (("t0", part) for part in as_scores(rows).values()), k)
    assert found["t0"].tolist() == sorted_choice(whole, k)["t0"]


def test_many_chunks_and_lazy_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    scores = {"a": torch.randn(40, 50), "b": torch.zeros(0), "c": torch.randn(1000).round(decimals=1)}
    lazy = {n: LazyScores(t.numel(), lambda a, b, t=t: t.reshape(-1)[a:b]) for n, t in scores.items()}
    for k in (1, 17, 1500, 3000):
        expected = sorted_choice(scores, k)
        assert {n: i.tolist() for n, i in select_topk(scores, k).items()} == expected
        assert {n: i.tolist() for n, i in select_topk(lazy, k).items()} == expected


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-42, 3e38])
@pytest.mark.parametrize("k", [1, 7, 36])
def test_equal_scores_go_by_tensor_then_index(value: float, k: int) -> None:
    scores = {"b": torch.full((4, 5), value), "a": torch.full((16,), value)}
    found = select_topk(scores, k)
    assert found["b"].tolist() == list(range(min(k, 20)))
    assert found["a"].tolist() == list(range(max(0, k - 20)))


def test_negative_zero_equals_zero() -> None:
    assert select_topk({"a": torch.tensor([-0.0, 0.0, -0.0])}, 2)["a"].tolist() == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_tensor(bad: float) -> None:
    scores = {"fine": torch.randn(10), "broken.weight": torch.tensor([1.0, bad, 2.0])}
    with pytest.raises(UserError, match=r"must be finite, broken\.weight") as caught:
        select_topk(scores, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(UserError, match="between 0 and the 3 scores"):
        select_topk({"a": torch.randn(3)}, k)


def test_kth_largest_says_how_many_ties_belong() -> None:
    value, ties, sizes = kth_largest({"a": torch.tensor([3.0, 1.0, 1.0]), "b": torch.tensor([1.0, 0.0])}, 3)
    assert (value, ties, sizes) == (1.0, 2, {"a": 3, "b": 2})


def test_local_scope_gives_equal_shares_that_add_up() -> None:
    scores = {"a": torch.randn(10, 10), "b": torch.randn(33), "c": torch.randn(7)}
    found = select(scores, 41, "local")
    assert sum(i.numel() for i in found.values()) == 41
    for name, indices in found.items():
        assert abs(indices.numel() - 41 * scores[name].numel() / 140) < 1
        assert indices.tolist() == sorted_choice({name: scores[name]}, indices.numel())[name]


def bounded_by_force(scores: dict[str, torch.Tensor], k: int, low: int, high: int) -> float:
    """The largest sum of scores under the bounds: floors first, then greedily whatever still fits (a matroid)."""
    ranked = {n: t.reshape(-1).sort(descending=True).values.tolist() for n, t in scores.items()}
    total, counts, rest = 0.0, {}, []
    for name, values in ranked.items():
        counts[name] = min(low, len(values))
        total += sum(values[: counts[name]])
        rest += [(-v, name) for v in values[counts[name] :]]
    left = k - sum(counts.values())
    for value, name in sorted(rest):
        if left and counts[name] < max(high, min(low, len(ranked[name]))):
            counts[name] += 1
            left -= 1
            total -= value
    assert left == 0
    return total


@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(7, 30), st.booleans())
def test_floors_and_caps_give_the_best_choice_under_them(seed: int, low: int, high: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        n: torch.randn(size, generator=generator) * scale for n, size, scale in [("a", 40, 3), ("b", 25, 1), ("c", 30, 0.1)]
    }
    if ties:
        scores = {n: t.round(decimals=0) for n, t in scores.items()}
    most = sum(min(high, t.numel()) for t in scores.values())
    k = int(torch.randint(3 * low, most + 1, (1,), generator=generator))
    found = select(scores, k, floors=dict.fromkeys(scores, low), caps=dict.fromkeys(scores, high))
    assert sum(i.numel() for i in found.values()) == k
    for name, indices in found.items():
        assert min(low, scores[name].numel()) <= indices.numel() <= high
        assert indices.tolist() == sorted_choice({name: scores[name]}, indices.numel())[name]
    reached = sum(float(scores[n][i.long()].sum()) for n, i in found.items())
    assert reached == pytest.approx(bounded_by_force(scores, k, low, high), rel=1e-4, abs=1e-4)


def test_bounds_that_cannot_hold() -> None:
    scores = {"a": torch.randn(5), "b": torch.randn(5)}
    with pytest.raises(UserError, match="between 6 and 10 entries"):
        select(scores, 5, floors={"a": 3, "b": 3})
    with pytest.raises(UserError, match="need scope global"):
        select(scores, 5, "local", floors={"a": 1})
    with pytest.raises(UserError, match="scope must be one of global, local"):
        select(scores, 5, "layer")
