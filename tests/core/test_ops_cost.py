"""The cost model charges each plan for what it does, and takes the cheapest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core.ops import cost, native, triton_turn
from speft_core.ops.layout import Layout

# 7 entries in 3 rows (0, 4 and 9) and 5 columns (1, 2, 3, 8 and 12) of a weight of 11 rows and 13 columns
ENTRIES = [1, 2, 12, 4 * 13 + 2, 4 * 13 + 3, 9 * 13 + 8, 9 * 13 + 12]
LAYOUT = Layout.of(torch.tensor(ENTRIES, dtype=torch.int32), (11, 13))
CHARGED = {
    "product": {"compact": 3 * 5, "dense": 11 * 5},
    "gather": {"compact": 3 + 5, "dense": 5},
    "turn": {"sampled": 3 + 5},
    "start": {"sampled": 1},
    "operators": {"compact": 1, "dense": 1},
    "sampled": {"sampled": 7},
    "native": {"native": 7},
    "spread": {"native": 3 + 5},
}


@pytest.mark.parametrize("rate", [f.name for f in dataclasses.fields(cost.Rates)])
@pytest.mark.parametrize("compiled", [True, False])
def test_each_plan_is_charged_for_what_it_does(monkeypatch: pytest.MonkeyPatch, rate: str, compiled: bool) -> None:
    free = cost.Rates(**dict.fromkeys((f.name for f in dataclasses.fields(cost.Rates)), 0.0))
    monkeypatch.setattr(cost, "rates_for", lambda _: dataclasses.replace(free, **{rate: 2.0}))
    monkeypatch.setattr(native, "fits", lambda _: compiled)
    plans = ["compact", "sampled", "dense", *(["native"] if compiled else [])]
    assert cost.estimates(LAYOUT, torch.zeros(11, 13)) == {p: 2.0 * CHARGED[rate].get(p, 0) for p in plans}


PLANS = st.sampled_from(["compact", "sampled", "dense", "native"])


@given(st.dictionaries(PLANS, st.floats(1, 1e6), min_size=2))
def test_the_cheapest_is_taken_and_the_next_is_named(costs: dict[str, float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "estimates", lambda *_: costs)
        name, reason = cost.choose(LAYOUT, torch.zeros(11, 13))
    first, second, *_ = sorted(costs.values())
    assert costs[name] == first
    entries, _, prices = reason.partition(": ")
    assert entries == "7 entries in 3 rows x 5 columns (10.5% of the area)"
    cheapest, _, other = prices.partition(" ns a token, ")
    runner_up, price = other.split()
    assert float(cheapest) == pytest.approx(first / 1000, abs=0.051)
    assert float(price) == pytest.approx(second / 1000, abs=0.051)
    assert runner_up != name and costs[runner_up] == second


@pytest.mark.parametrize(("slow", "tiles"), [(True, False), (False, False), (False, True)])
def test_the_constants_are_those_of_the_weights_kind(monkeypatch: pytest.MonkeyPatch, slow: bool, tiles: bool) -> None:
    monkeypatch.setattr(cost, "has_tiles", lambda: tiles)
    monkeypatch.setattr(cost, "slow_on_cpu", lambda dtype: slow and dtype in (torch.bfloat16, torch.float16))
    low = cost.CPU_SLOW_BF16 if slow else cost.CPU_TILES_BF16 if tiles else cost.CPU_BF16
    expected = {torch.float32: cost.CPU_FP32, torch.float64: cost.CPU_FP32, torch.bfloat16: low, torch.float16: low}
    for dtype, rates in expected.items():
        assert cost.rates_for(torch.zeros(2, 2, dtype=dtype)) is rates


@pytest.mark.parametrize("installed", [True, False])
def test_on_a_gpu_wide_numbers_and_a_missing_triton_cost_more(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(triton_turn, "installed", lambda: installed)
    expected = {torch.bfloat16: cost.CUDA, torch.float16: cost.CUDA, torch.float32: cost.CUDA_WIDE, torch.float64: cost.CUDA_WIDE}
    for dtype, rates in expected.items():
        found = cost.rates_for(torch.zeros(2, 2, dtype=dtype, device="meta"))
        if installed and dtype != torch.float64:
            assert found is rates
        else:
            assert found == dataclasses.replace(rates, sampled=10 * rates.sampled, turn=10 * rates.turn)


@pytest.mark.parametrize(
    "rates",
    [cost.CPU_FP32, cost.CPU_BF16, cost.CPU_SLOW_BF16, cost.CUDA],
    ids=["fp32", "bf16", "slow", "cuda"],
)
def test_clustered_masks_get_products_and_scattered_ones_entries(monkeypatch: pytest.MonkeyPatch, rates: cost.Rates) -> None:
    monkeypatch.setattr(cost, "rates_for", lambda _: rates)
    monkeypatch.setattr(native, "fits", lambda _: False)
    width = 4096 if rates is cost.CUDA else 576  # a GPU does a small dense product in no time
    weight = torch.empty(width, width, device="meta")
    block = (torch.arange(80)[:, None] * width + torch.arange(80)).flatten()  # 6,400 entries in 80 rows and 80 columns
    scattered = torch.randint(width * width, (block.numel(),)).unique()
    assert cost.choose(Layout.of(block, (width, width)), weight)[0] == "compact"
    assert cost.choose(Layout.of(scattered, (width, width)), weight)[0] == "sampled"


def test_a_gpu_takes_all_rows_or_columns_where_nearly_all_are_touched() -> None:
    weight = torch.empty(104, 50, device="meta")
    rows = Layout.of(torch.arange(85) * 50, (104, 50))  # 85 rows, one column
    parts = cost.work(rows, weight)
    assert parts["compact"] == {"product": 104 * 1, "gather": 1, "operators": 1} and parts["dense"] == parts["compact"]
    few = cost.work(Layout.of(torch.arange(70) * 50, (104, 50)), weight)
    assert few["compact"] == {"product": 70, "gather": 71, "operators": 1}
    odd = cost.work(Layout.of(torch.arange(99) * 50, (101, 50)), torch.empty(101, 50, device="meta"))
    assert odd["compact"] == {"product": 99, "gather": 100, "operators": 1}  # 101 numbers side by side are gathered anew in any case


def test_on_a_gpu_most_columns_are_taken_whole_as_most_rows_are() -> None:
    for count, product, gathered in ((32, 40, 0), (31, 31, 31)):  # from four fifths on, that one too
        parts = cost.work(Layout.of(torch.arange(count), (8, 40)), torch.empty(8, 40, device="meta"))
        assert parts["compact"] == {"product": product, "gather": gathered + 1, "operators": 1}
        assert parts["dense"] == {"product": 8 * product, "gather": gathered, "operators": 1}
