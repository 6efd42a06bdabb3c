"""Exact streaming selection: against sorting, with ties, bounds, streams and scores that are not finite."""

from __future__ import annotations

import math

import numpy as np
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


@given(FLOATS, FLOATS)
def test_keys_and_buckets_sort_as_the_scores_do(x: float, y: float) -> None:
    keys = [int(k) for k in module._keys(torch.tensor([x, y]))]
    assert (keys[0] < keys[1], keys[0] == keys[1]) == (x < y, x == y)
    assert module._value(keys[0]) == x
    bucket, low = module.BUCKETS // 2 - 1 - (keys[0] >> 16), module.BUCKETS - 1 - (keys[0] & 0xFFFF)
    assert module._edge(bucket) <= x < module._edge(bucket - 1)
    assert module._key(bucket, low) == keys[0]
    assert module._in_bucket(torch.tensor([x]), bucket).tolist() == [x]
    assert (y in module._in_bucket(torch.tensor([y]), bucket)) == (keys[1] >> 16 == keys[0] >> 16)
    assert np.flatnonzero(module._high(torch.tensor([x]))).tolist() == [bucket]
    assert np.flatnonzero(module._low(torch.tensor([x]))).tolist() == [low]


def test_past_the_last_buckets_lies_infinity() -> None:
    edges = [module._edge(b) for b in range(-1, module.BUCKETS)]
    assert edges[0] == math.inf and edges[-1] == -math.inf
    assert all(a >= b for a, b in zip(edges[:-1], edges[1:], strict=True))
    assert sum(math.isfinite(e) for e in edges) == 2 * 0x7F80 - 1 + 1  # upper halves of finite numbers, both zeros as one key


@given(st.integers(0, 3), st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc")))
def test_bounds_of_some_tensors_leave_the_others_free(seed: int, floored: set[str], capped: set[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(9, generator=generator) + i for i, n in enumerate("abc")}  # c above b above a
    floors, caps = dict.fromkeys(sorted(floored), 4), dict.fromkeys(sorted(capped), 2)  # a floor wins over a cap
    most = sum(max(caps.get(n, 9), floors.get(n, 0)) for n in scores)
    k = min(12, most)
    found = select(scores, k, floors=floors, caps=caps)
    left, expected = k - sum(floors.values()), {}
    for name in "cba":
        low, high = floors.get(name, 0), max(caps.get(name, 9), floors.get(name, 0))
        expected[name] = low + min(left, high - low)
        left -= expected[name] - low
    assert {n: i.numel() for n, i in found.items()} == expected
    assert {n: i.tolist() for n, i in found.items()} == {n: sorted_choice({n: t}, expected[n])[n] for n, t in scores.items()}


def test_every_way_to_ask_for_too_much_is_told_with_its_figures() -> None:
    scores = {"a": torch.zeros(1500), "b": LazyScores(500, lambda start, stop: torch.zeros(stop - start))}
    with pytest.raises(UserError, match=r"^k must lie between 0 and the 2,000 scores, got 2,001$"):
        select_topk(scores, 2001)
    with pytest.raises(UserError, match=r"^k must lie between 0 and the 2,000 scores, got 0$"):
        select_topk(scores.items, 0)  # of a stream nothing can be known without a pass
    bounds = "min_per_layer and max_per_layer allow between"
    with pytest.raises(UserError, match=rf"^{bounds} 1,200 and 2,000 entries in all, the budget is k = 1,199$"):
        select(scores, 1199, floors={"a": 700, "b": 900})  # a floor above the tensor is all of it
    with pytest.raises(UserError, match=rf"^{bounds} 0 and 1,300 entries in all, the budget is k = 1,301$"):
        select(scores, 1301, caps={"a": 800})
    assert sum(i.numel() for i in select(scores, 1300, caps={"a": 800}).values()) == 1300
    for more in ({"floors": {"a": 1}}, {"caps": {"a": 1}}):
        with pytest.raises(UserError, match="^min_per_layer and max_per_layer need scope global: local gives every tensor"):
            select(scores, 5, "local", **more)  # type: ignore[arg-type]
    none = select_topk(scores, 0)
    assert {n: (i.dtype, i.numel()) for n, i in none.items()} == {"a": (torch.int32, 0), "b": (torch.int32, 0)}


def test_indices_are_as_wide_as_their_tensor() -> None:
    large = LazyScores(2**31, lambda start, stop: torch.zeros(stop - start))
    assert {n: i.dtype for n, i in select_topk({"large": large, "small": torch.zeros(2)}, 0).items()} == {
        "large": torch.int64, "small": torch.int32,
    }  # fmt: skip
    found = select_topk({"a": torch.zeros(2), "b": torch.tensor([2.0, 3.0], dtype=torch.float64)}, 1)
    assert {n: (i.dtype, i.tolist()) for n, i in found.items()} == {"a": (torch.int32, []), "b": (torch.int32, [1])}


def test_what_cannot_be_among_the_largest_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    counted: list[int] = []
    high = module._high
    monkeypatch.setattr(module, "_high", lambda scores_N: (counted.append(scores_N.numel()), high(scores_N))[1])
    descending = torch.arange(100, 0, -1).float() ** 3  # every ten in buckets of their own
    assert select_topk({"a": descending}, 10)["a"].tolist() == list(range(10))
    assert counted == [10]
    mixed = descending.view(10, 10).T.reshape(-1)  # each chunk has a part of the largest
    counted.clear()
    assert select_topk({"a": mixed}, 10)["a"].tolist() == list(range(0, 100, 10))
    assert 10 <= sum(counted) < 60


#: bits of fp32 scores a rounding apart, on both sides of the edge between two buckets
NEIGHBOURS = torch.tensor([0x3F80_FFFE, 0x3F80_FFFF, 0x3F81_0000, 0x3F81_0001], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_bounds_that_bind_nobody_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = {n: NEIGHBOURS[torch.randint(4, (9,), generator=generator)] for n in "abc"}
        k = int(torch.randint(1, 28, (1,), generator=generator))
        for bounds in ({}, {"caps": dict.fromkeys(scores, 9)}):
            found = select(scores, k, **bounds)
            assert {n: i.tolist() for n, i in found.items()} == sorted_choice(scores, k)


def test_a_budget_that_the_floors_use_up_leaves_nothing_to_the_others() -> None:
    scores = {"a": torch.arange(5.0), "b": torch.arange(9.0) + 9, "c": torch.arange(4.0)}
    found = select(scores, 5, floors={"a": 3, "c": 2})
    assert {n: i.tolist() for n, i in found.items()} == {"a": [2, 3, 4], "b": [], "c": [2, 3]}


def test_who_gave_no_bounds_is_not_told_of_any() -> None:
    with pytest.raises(UserError, match="^k must lie between 0 and the 3 scores, got 4$"):
        select({"a": torch.randn(3)}, 4)


def test_a_bucket_ends_below_the_edge_of_the_next() -> None:
    bucket = module.BUCKETS // 2 - 1 - 0x3F80
    assert module._edge(bucket - 1) == NEIGHBOURS[2]
    assert module._in_bucket(NEIGHBOURS, bucket).tolist() == NEIGHBOURS[:2].tolist()
    assert module._in_bucket(NEIGHBOURS, bucket - 1).tolist() == NEIGHBOURS[2:].tolist()


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def numpy(self, *, force: bool = False) -> np.ndarray:
        pytest.fail("NumPy reads memory of the CPU alone")


def test_positions_are_the_same_on_every_device() -> None:
    scores_N = torch.tensor([1.0, -2.0, 3.0, 1.0, 0.5])
    for bound in (1.0, 0.75, -math.inf, 4.0):
        expected = [i for i, score in enumerate(scores_N.tolist()) if score >= bound]
        assert module._at_least(scores_N, bound).tolist() == expected
        assert module._at_least(scores_N.as_subclass(Elsewhere), bound).tolist() == expected
