"""Products in pieces of tokens: the whole product's bits whatever the clock says, and only where pieces are faster."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional

from speft_core.ops import matmul, pieces

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX on which nothing was tried yet, and pieces of eight tokens."""
    monkeypatch.setattr(matmul, "has_tiles", lambda: True)
    monkeypatch.setattr(matmul, "wider_is_faster", lambda dtype: False)
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 8)
    monkeypatch.setattr(pieces, "_calls", {})
    monkeypatch.setattr(pieces, "_better", {})


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was multiplied in pieces, trials included."""
    asked: list[tuple[int, ...]] = []
    in_pieces = pieces.in_pieces
    monkeypatch.setattr(pieces, "in_pieces", lambda left, right: (asked.append(tuple(left.shape)), in_pieces(left, right))[1])
    return asked


def operands(*shape: int, columns: int = 6, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape).to(dtype), torch.randn(shape[-1], columns).to(dtype)


def slowly(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return left @ right


def called(whole: pieces.Product, left: torch.Tensor, right: torch.Tensor, times: int) -> list[torch.Tensor]:
    return [pieces.product(left, right, whole) for _ in range(times)]


@pytest.mark.parametrize("shape", [(20, 5), (4, 5, 7), (9, 1), (3, 8, 64)], ids=str)
def test_a_shape_that_comes_again_is_tried_once_and_cut_where_that_is_faster(
    cut: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    left, right = operands(*shape)
    before = called(slowly, left, right, pieces.TRIED_AT - 1)
    assert cut == []
    called(slowly, left, right, 1)
    assert cut == [shape] * (pieces.ROUNDS + 1)
    (after,) = called(lambda *_: pytest.fail("the whole product is the slower one"), left, right, 1)
    assert len(cut) == pieces.ROUNDS + 2
    assert all(torch.equal(after, found) for found in before) and after.shape == (*shape[:-1], 6)


def test_a_product_that_is_faster_whole_stays_whole(monkeypatch: pytest.MonkeyPatch, cut: list[tuple[int, ...]]) -> None:
    left, right = operands(20, 5)
    logged = pieces.in_pieces
    monkeypatch.setattr(pieces, "in_pieces", lambda *given: (time.sleep(0.01), logged(*given))[1])
    called(torch.matmul, left, right, pieces.TRIED_AT + 3)
    assert len(cut) == pieces.ROUNDS


def test_pieces_with_other_bits_are_never_taken_though_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, cut: list[tuple[int, ...]]
) -> None:
    left, right = operands(20, 5)
    logged = pieces.in_pieces

    def one_bit_off(*given: torch.Tensor) -> torch.Tensor:
        found = logged(*given)
        found.view(torch.int16)[-1, -1] ^= 1
        return found

    monkeypatch.setattr(pieces, "in_pieces", one_bit_off)
    zeros = torch.zeros_like(left)  # a gradient of which nothing is to be seen
    assert not any(found.any() for found in called(slowly, zeros, right, pieces.TRIED_AT + 3))
    assert len(cut) == pieces.ROUNDS


def test_another_number_of_threads_or_another_order_of_the_weight_is_another_shape(cut: list[tuple[int, ...]]) -> None:
    left, right = operands(20, 5)
    called(slowly, left, right, pieces.TRIED_AT)
    known = len(cut)
    called(slowly, left, right.T.contiguous().T, pieces.TRIED_AT - 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        called(slowly, left, right, pieces.TRIED_AT - 1)
    finally:
        torch.set_num_threads(threads)
    assert len(cut) == known


def test_a_trial_leaves_the_random_numbers_as_they_are(cut: list[tuple[int, ...]]) -> None:
    left, right = operands(20, 5)
    state = torch.get_rng_state()
    called(slowly, left, right, pieces.TRIED_AT)
    assert cut and torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_cut_or_gains_nothing_is_left_whole(monkeypatch: pytest.MonkeyPatch, cut: list[tuple[int, ...]]) -> None:
    left, right = operands(20, 5)
    few, wide = operands(8, 5), operands(20, 5, dtype=torch.float32)
    apart = torch.randn(20, 10).to(HALF)[:, ::2]
    for given in (few, wide, (apart, right), (left, right.float()), (left[:, :0], right[:0]), (left.to("meta"), right.to("meta"))):
        for _ in range(pieces.TRIED_AT + 1):
            pieces.product(*given, lambda a, b: slowly(a, b.to(a.dtype)))
    marked = left.clone().requires_grad_()
    for _ in range(pieces.TRIED_AT + 1):
        pieces.product(marked, right, slowly).sum().backward()
    assert marked.grad is not None and cut == []
    monkeypatch.setattr(matmul, "has_tiles", lambda: False)
    for _ in range(pieces.TRIED_AT + 1):
        matmul.grad_input(left, right)
        matmul.linear(left, right.t(), None)
    assert pieces._calls == {} and cut == []


@pytest.mark.parametrize("tokens", [513, 700, 1024])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 32), (576, 192), (64, 576)])
def test_layers_have_the_bits_that_they_have_without(
    monkeypatch: pytest.MonkeyPatch, tokens: int, outputs: int, inputs: int
) -> None:
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 512)
    monkeypatch.setattr(pieces, "FASTER", float("inf"))  # whatever has the same bits is taken
    x, weight = torch.randn(tokens, inputs).to(HALF), torch.nn.Parameter(torch.randn(outputs, inputs).to(HALF), requires_grad=False)
    grad_y, bias = torch.randn(tokens, outputs).to(HALF), torch.randn(outputs).to(HALF)
    for _ in range(pieces.TRIED_AT + 1):
        assert torch.equal(matmul.linear(x, weight, None), functional.linear(x, weight))
        assert torch.equal(matmul.linear(x, weight, bias), functional.linear(x, weight, bias))
        assert torch.equal(matmul.grad_input(grad_y, weight), grad_y @ weight)
    assert len(pieces._better) == 2


def test_a_second_derivative_passes_through(cut: list[tuple[int, ...]]) -> None:
    weight, grad_y = torch.randn(6, 5).to(HALF), torch.randn(20, 6).to(HALF).requires_grad_()
    for _ in range(pieces.TRIED_AT + 1):
        (found,) = torch.autograd.grad(matmul.grad_input(grad_y, weight).sum(), grad_y)
        torch.testing.assert_close(found, weight.sum(1).expand(20, 6), rtol=2**-6, atol=2**-6)
    assert cut == []
