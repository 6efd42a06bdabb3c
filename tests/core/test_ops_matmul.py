"""The input gradient of a linear layer: in fp32 where this CPU is faster so, with the same numbers whatever the tiles."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from speft_core.ops import matmul
from speft_core.ops.matmul import grad_input

WIDENED = [torch.bfloat16, torch.float16]


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 16-bit product in fp32, in tiles smaller than the operands below."""
    monkeypatch.setattr(matmul, "wider_is_faster", lambda dtype: dtype in WIDENED)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", 1 << 9)
    monkeypatch.setattr(matmul, "TILE_TOKENS", 16)


def operands(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, outputs).to(dtype), torch.randn(outputs, inputs).to(dtype)


@pytest.mark.usefixtures("widening")
@pytest.mark.parametrize("dtype", WIDENED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (16, 64, 8), (33, 19, 70), (50, 600, 17)])
def test_widened_products_are_the_exact_ones_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    grad_TO, weight_OI = operands(*shape, dtype)
    found = [grad_input(grad_TO, weight_OI) for _ in range(2)]
    exact = grad_TO.double() @ weight_OI.double()
    assert found[0].dtype == dtype
    assert torch.equal(*found)
    assert (found[0] - exact).abs().max() <= 2**-8 * exact.abs().max()
    turned = grad_input(grad_TO, weight_OI.T.contiguous().T)  # as Conv1D keeps its weights
    assert torch.equal(turned, found[0])


@pytest.mark.usefixtures("widening")
def test_results_are_not_the_buffers_that_later_calls_write() -> None:
    grad_TO, weight_OI = operands(20, 30, 40, torch.bfloat16)
    first = grad_input(grad_TO, weight_OI)
    kept = first.clone()
    grad_input(2 * grad_TO, weight_OI)
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("widening")
def test_threads_do_not_share_buffers() -> None:
    work = [operands(24, 40, 56, torch.bfloat16) for _ in range(8)]
    alone = [grad_input(*pair) for pair in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(lambda pair: grad_input(*pair), work), strict=True))


@pytest.mark.usefixtures("widening")
def test_a_second_derivative_passes_through() -> None:
    grad_TO, weight_OI = operands(6, 5, 4, torch.bfloat16)
    grad_TO.requires_grad_()
    grad_x_TI = grad_input(grad_TO, weight_OI)
    assert torch.equal(grad_x_TI, grad_input(grad_TO, weight_OI + weight_OI.float() * 2**-10))  # an fp32 weight is rounded first
    grad_x_TI.sum().backward()
    assert grad_TO.grad is not None
    assert torch.allclose(grad_TO.grad, weight_OI.sum(1).expand(6, 5), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_products_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    grad_TO, weight_OI = operands(20, 30, 40, dtype)
    assert not matmul.wider_is_faster(dtype)
    assert torch.equal(grad_input(grad_TO, weight_OI), grad_TO @ weight_OI)


def test_a_cpu_without_kernels_is_always_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: dtype == torch.bfloat16)
    assert matmul.wider_is_faster.__wrapped__(torch.bfloat16)
    assert not matmul.wider_is_faster.__wrapped__(torch.float32)


@pytest.mark.parametrize(
    ("name", "tiles", "widened"), [("Intel Xeon", False, True), ("Intel Xeon", True, False), ("AMD EPYC", False, False)]
)
def test_bf16_kernels_are_used_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: bool, widened: bool
) -> None:
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: False)
    monkeypatch.setattr(matmul, "has_tiles", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert matmul.wider_is_faster.__wrapped__(torch.bfloat16) is widened
    assert not matmul.wider_is_faster.__wrapped__(torch.float16)


@pytest.mark.parametrize(
    ("name", "wide", "chosen"), [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel Xeon", True, False), (None, True, False)]
)
def test_onednn_multiplies_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, name: str | None, wide: bool, chosen: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": wide}, raising=False)
    faster = matmul.onednn_is_faster.__wrapped__
    assert faster() is chosen
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # then PyTorch multiplies with something else
    assert not faster()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a PyTorch without the operator
    assert not faster()


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN on any CPU; the shapes of what it multiplied."""
    if not matmul.has_onednn():
        pytest.skip("this PyTorch is built without oneDNN, as on a Mac")
    asked: list[tuple[int, ...]] = []
    product = matmul.onednn_product
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matmul, "onednn_product", lambda g, w: (asked.append((*g.shape, w.shape[1])), product(g, w))[1])
    return asked


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (64, 96, 192), (33, 600, 70)], ids=str)
def test_products_by_onednn_are_right_whatever_the_strides(by_onednn: list[tuple[int, ...]], shape: tuple[int, int, int]) -> None:
    tokens, outputs, inputs = shape
    weight_OI = torch.nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
    for grad_TO in (
        torch.randn(tokens, outputs),
        torch.randn(outputs, tokens).T,
        torch.randn(tokens, 3 * outputs)[:, outputs : 2 * outputs],
        torch.ones(1).expand(tokens, outputs),  # the gradient of a sum
    ):
        for weight in (weight_OI, weight_OI.T.contiguous().T, torch.randn(2 * outputs, 2 * inputs)[::2, ::2]):
            by_onednn.clear()
            found_TI = grad_input(grad_TO, weight)
            assert by_onednn == [(tokens, outputs, inputs)]
            assert found_TI.dtype == torch.float32 and found_TI.is_contiguous()
            torch.testing.assert_close(found_TI.double(), grad_TO.double() @ weight.double(), rtol=1e-5, atol=1e-4)
            assert torch.equal(found_TI, grad_input(grad_TO, weight))


def test_a_bf16_gradient_of_an_fp32_weight_and_what_onednn_has_no_derivative_of_stay_pytorchs(
    monkeypatch: pytest.MonkeyPatch, by_onednn: list[tuple[int, ...]]
) -> None:
    grad_TO, weight_OI = operands(6, 5, 4, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        grad_input(grad_TO.to(dtype), weight_OI)
    grad_input(grad_TO[:0], weight_OI)
    grad_input(torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta"))
    grad_TO.requires_grad_()
    grad_input(grad_TO, weight_OI).sum().backward()
    assert torch.allclose(grad_TO.grad, weight_OI.sum(1).expand(6, 5))
    with monkeypatch.context() as user:
        user.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)  # as torch.backends.mkldnn.flags(enabled=False) sets it
        grad_input(grad_TO.detach(), weight_OI)
    assert by_onednn == []
    with torch.no_grad():  # as in a backward without create_graph
        grad_input(grad_TO, weight_OI.to(torch.float64))
    assert by_onednn == [(6, 5, 4)]


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


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 1, 5), (2, 0)], ids=str)
def test_tokens_may_have_any_shape_and_order(
    monkeypatch: pytest.MonkeyPatch, lead: tuple[int, ...], dtype: torch.dtype, wide: bool
) -> None:
    monkeypatch.setattr(matmul, "wider_is_faster", lambda d: wide and d == torch.bfloat16)
    weight_OI, grad_y = torch.randn(7, 4).to(dtype), torch.randn(*lead, 7).to(dtype)
    expected = grad_input(grad_y.reshape(math.prod(lead), 7), weight_OI).view(*lead, 4)
    assert torch.equal(grad_input(grad_y, weight_OI), expected)
    apart = torch.empty(*lead, 14, dtype=dtype)[..., ::2].copy_(grad_y)
    assert torch.equal(grad_input(apart, weight_OI), expected)
    if len(lead) > 1:
        turned = grad_y.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(grad_input(turned, weight_OI), expected)
        alike = torch.randn(7).to(dtype).expand(*lead, 7)  # as of a sum
        assert torch.equal(grad_input(alike, weight_OI), grad_input(alike.contiguous(), weight_OI))


@pytest.mark.parametrize("elements", [1, 64, 1 << 22])
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 19), (1, 1, 1), (0, 4, 3), (3, 0, 4), (3, 4, 0)], ids=str)
def test_grad_input_is_the_product_in_tiles_of_any_size(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, slow: bool, elements: int
) -> None:
    tokens, outputs, inputs = shape
    monkeypatch.setattr(matmul, "wider_is_faster", lambda _: slow)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", elements)
    for weight_dtype in (dtype, torch.float32):
        grad_TO, weight_OI = torch.randn(tokens, outputs).to(dtype), torch.randn(outputs, inputs).to(weight_dtype)
        found_TI = matmul.grad_input(grad_TO, weight_OI)
        expected_TI = grad_TO.double() @ weight_OI.to(dtype).double()
        assert found_TI.dtype == dtype and found_TI.shape == (tokens, inputs)
        torch.testing.assert_close(found_TI.double(), expected_TI, rtol=2e-2, atol=5e-2)


def test_no_more_than_a_tile_of_the_weight_and_of_the_tokens_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "wider_is_faster", lambda _: True)
    monkeypatch.setattr(matmul, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(matmul, "TILE_TOKENS", 2)
    asked: list[tuple[str, tuple[int, ...]]] = []
    scratch = matmul._scratch
    monkeypatch.setattr(matmul, "_scratch", lambda name, shape: (asked.append((name, tuple(shape))), scratch(name, shape))[1])

    def shapes(name: str) -> list[tuple[int, ...]]:
        return [shape for asked_name, shape in asked if asked_name == name]

    matmul.grad_input(torch.randn(3, 10).bfloat16(), torch.randn(10, 20).bfloat16())
    assert shapes("weight") == [(10, 6)] * 3 + [(10, 2)]
    assert shapes("grad") == [(2, 10), (1, 10)] * 4
    assert shapes("product") == [(2, 6), (1, 6)] * 3 + [(2, 2), (1, 2)]
    asked.clear()
    matmul.grad_input(torch.randn(2, 1).bfloat16(), torch.randn(1, 64).bfloat16())
    assert shapes("weight") == [(1, 64)]
    asked.clear()
    matmul.grad_input(torch.randn(2, 65).bfloat16(), torch.randn(65, 2).bfloat16())
    assert shapes("weight") == [(65, 1)] * 2


def test_a_buffer_is_kept_for_as_much_and_for_less() -> None:
    places = [matmul._scratch("test", shape).data_ptr() for shape in ((4, 6), (6, 4), (2, 3), (4, 6))]
    assert set(places) == {places[0]}
    assert matmul._scratch("test", (5, 5)).shape == (5, 5)


@pytest.mark.usefixtures("widening")
def test_a_wide_weight_is_rounded_before_it_is_widened() -> None:
    grad_TO, weight_OI = operands(20, 30, 40, torch.bfloat16)
    assert torch.equal(grad_input(grad_TO, weight_OI), grad_input(grad_TO, weight_OI + weight_OI.float() * 2**-10))


def test_on_another_device_the_product_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "wider_is_faster", lambda _: pytest.fail("only a CPU can be slow"))
    found = matmul.grad_input(
        torch.empty(3, 4, dtype=torch.bfloat16, device="meta"), torch.empty(4, 5, dtype=torch.bfloat16, device="meta")
    )
    assert found.shape == (3, 5) and found.device.type == "meta"
