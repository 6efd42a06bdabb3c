"""The cost model charges each plan for what it does, and takes the cheapest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core.ops import cost, matmul, native
from speft_core.ops.layout import Layout

# 7 entries in 3 rows (0, 4 and 9) and 5 columns (1, 2, 3, 8 and 12) of a weight of 11 rows and 13 columns
ENTRIES = [1, 2, 12, 4 * 13 + 2, 4 * 13 + 3, 9 * 13 + 8, 9 * 13 + 12]
LAYOUT = Layout.of(torch.tensor(ENTRIES, dtype=torch.int32), (11, 13))
CHARGED = {
    "product": {"compact": 3 * 5, "dense": 11 * 5},
    "gather": {"compact": 3 + 5, "sampled": 3 * (3 + 5), "dense": 5},
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


@pytest.mark.parametrize("slow", [True, False])
def test_the_constants_are_those_of_the_weights_kind(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(cost, "slow_on_cpu", lambda dtype: slow and dtype in (torch.bfloat16, torch.float16))
    low = cost.CPU_SLOW_BF16 if slow else cost.CPU_BF16
    expected = {torch.float32: cost.CPU_FP32, torch.float64: cost.CPU_FP32, torch.bfloat16: low, torch.float16: low}
    for dtype, rates in expected.items():
        assert cost.rates_for(torch.zeros(2, 2, dtype=dtype)) is rates
        assert cost.rates_for(torch.zeros(2, 2, dtype=dtype, device="meta")) is cost.CUDA


@pytest.mark.parametrize("rates", [cost.CPU_FP32, cost.CPU_BF16, cost.CPU_SLOW_BF16, cost.CUDA], ids=["fp32", "bf16", "slow", "cuda"])
def test_clustered_masks_get_products_and_scattered_ones_entries(monkeypatch: pytest.MonkeyPatch, rates: cost.Rates) -> None:
    monkeypatch.setattr(cost, "rates_for", lambda _: rates)
    monkeypatch.setattr(native, "fits", lambda _: False)
    weight = torch.empty(576, 576, device="meta")
    block = (torch.arange(40)[:, None] * 576 + torch.arange(40)).flatten()  # 0.5 % of the weight in 40 rows and 40 columns
    scattered = torch.randperm(576 * 576)[: block.numel()].sort().values
    assert cost.choose(Layout.of(block, (576, 576)), weight)[0] == "compact"
    assert cost.choose(Layout.of(scattered, (576, 576)), weight)[0] == "sampled"


class _Mkldnn:
    """What PyTorch says of its matrix kernels: yes, no, or nothing."""

    def __init__(self, bf16: bool | Exception, fp16: bool | Exception) -> None:
        self._answers = {"bf16": bf16, "fp16": fp16}

    def _ask(self, kind: str) -> bool:
        answer = self._answers[kind]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _is_mkldnn_bf16_supported(self) -> bool:
        return self._ask("bf16")

    def _is_mkldnn_fp16_supported(self) -> bool:
        return self._ask("fp16")


@pytest.mark.parametrize(
    ("bf16", "fp16"), [(True, False), (False, True), (RuntimeError(), False), (False, AttributeError())], ids=repr
)
def test_a_dtype_is_slow_where_pytorch_has_no_kernel_for_it(
    monkeypatch: pytest.MonkeyPatch, bf16: bool | Exception, fp16: bool | Exception
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", _Mkldnn(bf16, fp16))
    slow = matmul.slow_on_cpu.__wrapped__
    assert slow(torch.bfloat16) is (bf16 is False)  # where PyTorch does not say, its own product is used
    assert slow(torch.float16) is (fp16 is False)
    assert not slow(torch.float32) and not slow(torch.float64)


@pytest.mark.parametrize("elements", [1, 64, 1 << 22])
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 19), (1, 1, 1), (0, 4, 3), (3, 0, 4), (3, 4, 0)], ids=str)
def test_grad_input_is_the_product_in_tiles_of_any_size(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, slow: bool, elements: int
) -> None:
    tokens, outputs, inputs = shape
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda _: slow)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", elements)
    for weight_dtype in (dtype, torch.float32):
        grad_TO, weight_OI = torch.randn(tokens, outputs).to(dtype), torch.randn(outputs, inputs).to(weight_dtype)
        found_TI = matmul.grad_input(grad_TO, weight_OI)
        expected_TI = grad_TO.double() @ weight_OI.to(dtype).double()
        assert found_TI.dtype == dtype and found_TI.shape == (tokens, inputs)
        torch.testing.assert_close(found_TI.double(), expected_TI, rtol=2e-2, atol=5e-2)


def test_a_slow_product_widens_no_more_than_a_tile_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda _: True)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", 64)
    widened: list[tuple[int, ...]] = []
    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: (widened.append(tuple(self.shape)), to_float(self))[1])
    matmul.grad_input(torch.randn(3, 10).bfloat16(), torch.randn(10, 20).bfloat16())
    assert widened == [(3, 10), (10, 6), (10, 6), (10, 6), (10, 2)]


def test_on_another_device_the_product_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda _: pytest.fail("only a CPU can be slow"))
    found = matmul.grad_input(
        torch.empty(3, 4, dtype=torch.bfloat16, device="meta"), torch.empty(4, 5, dtype=torch.bfloat16, device="meta")
    )
    assert found.shape == (3, 5) and found.device.type == "meta"
