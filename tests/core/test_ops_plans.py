"""Every backward plan against the oracle: each dtype, awkward shapes, and float64 gradcheck."""

from __future__ import annotations

import pytest
import torch

from speft_core.errors import UserError
from speft_core.ops import blocks, cut, native
from speft_core.ops.functions import SparseLinear, Work
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS, plan_named
from speft_core.ops.reference import weight_gradient_entries

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float64: 1e-12}

# name -> (O, I, leading sizes of the input, how many entries or a list of them)
SHAPES = {
    "plain": (24, 16, (2, 9), 40),
    "one_row": (24, 16, (5,), [3 * 16 + 2, 3 * 16 + 5, 3 * 16 + 15]),
    "one_column": (24, 16, (5,), [4, 4 + 16, 4 + 16 * 23]),
    "one_entry": (24, 16, (7,), [101]),
    "last_entry": (24, 16, (7,), [24 * 16 - 1]),
    "empty": (24, 16, (7,), []),
    "full": (7, 5, (3, 4), 35),
    "odd_sizes": (37, 53, (3, 11), 211),
    "one_output": (1, 19, (6,), 4),
    "one_input": (19, 1, (6,), 4),
    "one_token": (12, 10, (1,), 30),
    "no_token": (12, 10, (0,), 30),
    "vector_input": (12, 10, (), 30),
    "four_dimensions": (12, 10, (2, 3, 4), 30),
    "many_tokens": (20, 33, (517,), 60),
    "one_dense_column": (40, 30, (9,), [r * 30 + 7 for r in range(40)] + [11, 29 + 30 * 39]),
}


def case(shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, grad_y and indices of a named shape."""
    outputs, inputs, leading, entries = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    if isinstance(entries, int):
        indices_K = torch.randperm(outputs * inputs, generator=generator)[:entries].sort().values
    else:
        indices_K = torch.tensor(sorted(set(entries)), dtype=torch.int64)
    x = torch.randn(*leading, inputs, generator=generator, dtype=torch.float64).to(dtype)
    grad_y = torch.randn(*leading, outputs, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, grad_y, indices_K.to(torch.int32)


def whole(x_TI: torch.Tensor) -> Inputs:
    """All columns of the input, as they are."""
    return Inputs([(x_TI, x_TI.dtype)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    if not expected.numel() or not expected.norm():
        return float(found.norm())
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("plan", [*PLANS, "auto"])
def test_each_plan_gives_the_oracles_entries(plan: str, shape: str, dtype: torch.dtype) -> None:
    x, weight, grad_y, indices_K = case(shape, dtype)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    row = PLANS[plan] if plan in PLANS else plan_named(plan, layout, weight)[0]
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    found_K = row.entries(whole(x_TI), grad_TO, layout)
    expected_K = weight_gradient_entries(x.double(), grad_y.double(), indices_K)
    assert found_K.shape == (indices_K.numel(),)
    assert found_K.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(found_K, expected_K) <= TOLERANCE[dtype]


@pytest.mark.parametrize("plan", list(PLANS))
def test_gradients_that_are_strided_or_expanded_are_read_rightly(plan: str) -> None:
    x, weight, grad_y, indices_K = case("odd_sizes", torch.float32)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    row = PLANS[plan]
    x_TI = x.reshape(-1, x.shape[-1])
    wide_TO = torch.randn(x_TI.shape[0], 2 * weight.shape[0])
    for grad_TO in (wide_TO[:, ::2], wide_TO[:1, : weight.shape[0]].expand(x_TI.shape[0], -1), torch.ones(()).expand(33, 37)):
        expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)
        found_K = row.entries(whole(x_TI), grad_TO, layout)
        assert relative(found_K, expected_K) <= 1e-5
    sliced_TI = torch.randn(33, 3 * 53)[:, 1::3]
    found_K = row.entries(whole(sliced_TI), wide_TO[:, :37], layout)
    assert relative(found_K, weight_gradient_entries(sliced_TI.double(), wide_TO[:, :37].double(), indices_K)) <= 1e-5


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("shape", ["plain", "one_row", "empty", "full", "vector_input", "four_dimensions"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck_in_float64(plan: str, shape: str, biased: bool) -> None:
    x, weight, _, indices_K = case(shape, torch.float64)
    base_K = weight.reshape(-1)[indices_K.long()].clone()
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    bias = torch.randn(weight.shape[0], dtype=torch.float64).requires_grad_() if biased else None
    values_K = torch.zeros(indices_K.numel(), dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor, values_K: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():  # base + values is in the weight, as an attached forward leaves it
            weight.view(-1)[indices_K.long()] = base_K + values_K
        return SparseLinear.apply(x, weight.clone(), bias, values_K, Work(PLANS[plan], layout))

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), values_K, bias))


def test_tiles_of_one_row_and_of_all_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad_y, indices_K = case("odd_sizes", torch.float32)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    for name in ("compact", "dense"):
        row, found = PLANS[name], []
        for elements in (1, 300, 1 << 20):
            monkeypatch.setitem(blocks.TILE_ELEMENTS, "cpu", elements)
            found.append(row.entries(whole(x_TI), grad_TO, layout))
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("plan", ["compact", "dense"])
@pytest.mark.parametrize("elements", [1, 200, 1 << 20])
def test_even_sizes_as_on_a_gpu_change_no_entry(plan: str, shape: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cut.EVEN, "cpu", 4)
    for table, value in ((blocks.TILE_ELEMENTS, elements), (blocks.TILE_ROWS, 4), (blocks.WHOLE_ABOVE, 0.5)):
        monkeypatch.setitem(table, "cpu", value)
    x, weight, grad_y, indices_K = case(shape, torch.float32)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    expected_K = weight_gradient_entries(x.double(), grad_y.double(), indices_K)
    assert relative(PLANS[plan].entries(whole(x_TI), grad_TO, layout), expected_K) <= 1e-5
    kept = Inputs([(x_TI[:, layout.cols_C.long()], torch.float32)], layout.cols_C, "own")
    assert relative(PLANS[plan].entries(kept, grad_TO, layout), expected_K) <= 1e-5


def test_tiles_are_small_on_a_cpu_and_alike_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, elements, rows in (("cpu", 64, 1), ("cuda", 1024, 4)):
        monkeypatch.setitem(blocks.TILE_ELEMENTS, kind, elements)
        monkeypatch.setitem(blocks.TILE_ROWS, kind, rows)
    assert [blocks._step(9, columns, "cpu") for columns in (0, 1, 8, 64, 1000)] == [64, 64, 8, 1, 1]
    assert [blocks._step(rows, 10, "cuda") for rows in (50, 102, 103, 290, 300)] == [102, 102, 52, 100, 100]


def test_all_are_taken_where_a_gather_costs_more_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted_N = torch.tensor([0, 2, 3], dtype=torch.int32)
    some, every = cut.Cut.of(wanted_N, 4, 1.0), cut.Cut.of(wanted_N, 4, 0.75)
    assert some.picks_P is not None and some.picks_P.tolist() == [0, 2, 3] and some.size == 3
    assert some.places_N.tolist() == [0, 1, 2] and some.places_N.dtype == torch.int32
    assert every.picks_P is None and every.size == 4 and every.places_N is wanted_N
    assert [cut.kind_of(torch.empty(1, device=device)) for device in ("cpu", "meta")] == ["cpu", "cuda"]
    assert cut.Cut.of(wanted_N.to("meta"), 400, 1.0).places_N.device.type == "meta"
    monkeypatch.setitem(cut.EVEN, "cpu", 4)  # from here on as on a GPU
    wanted_N = torch.arange(5) * 2
    some, every = cut.Cut.of(wanted_N, 12, 0.5), cut.Cut.of(wanted_N, 16, 0.5)
    assert some.picks_P is not None and some.picks_P.tolist() == [0, 2, 4, 6, 8, 8, 8, 8] and some.size == 8
    assert some.places_N.tolist() == [0, 1, 2, 3, 4]
    assert every.picks_P is None and every.size == 16


@pytest.mark.parametrize("shape", ["plain", "empty"])
@pytest.mark.parametrize("plan", ["compact", "dense"])
def test_entries_lie_where_the_gradient_does(plan: str, shape: str) -> None:
    x, weight, grad_y, indices_K = case(shape, torch.bfloat16)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1])).to(torch.device("meta"))
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]).to("meta"), grad_y.reshape(-1, grad_y.shape[-1]).to("meta")
    for inputs in (whole(x_TI), Inputs([(x_TI[:, : layout.cols_C.numel()], torch.bfloat16)], layout.cols_C, "own")):
        found_K = PLANS[plan].entries(inputs, grad_TO, layout)
        assert (found_K.device.type, found_K.dtype, found_K.numel()) == ("meta", torch.float32, indices_K.numel())
        assert inputs.places(layout).device.type == "meta"


def test_one_layout_serves_gradients_of_two_dtypes() -> None:
    x, weight, grad_y, indices_K = case("odd_sizes", torch.float64)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    expected_K = weight_gradient_entries(x, grad_y, indices_K)
    for dtype in (torch.float32, torch.float64, torch.float32):
        found_K = PLANS["sampled"].entries(whole(x_TI.to(dtype)), grad_TO.to(dtype), layout)
        assert found_K.dtype == dtype and relative(found_K, expected_K) <= TOLERANCE[dtype]
        pattern = layout.derived(("csr", dtype), lambda: pytest.fail("the pattern is remembered"))
        assert pattern.crow_indices().dtype == pattern.col_indices().dtype == layout.cols_C.dtype
        assert pattern.shape == (layout.rows_R.numel(), layout.cols_C.numel())


def test_an_unknown_plan_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"auto or one of compact, .*got 'fast'"):
        plan_named("fast", Layout.of(torch.tensor([1]), (2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_layout_names_each_entrys_row_and_column(shape: str) -> None:
    _, weight, _, indices_K = case(shape, torch.float32)
    layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
    flat_K = layout.rows_R[layout.row_of_K.long()].long() * weight.shape[1] + layout.cols_C[layout.col_of_K.long()]
    assert torch.equal(flat_K, indices_K.long())
    assert int(layout.first_R[-1]) == layout.nnz == indices_K.numel()
    assert torch.equal(torch.diff(layout.first_R), torch.bincount(layout.row_of_K.long(), minlength=layout.rows_R.numel()))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("plan", list(PLANS))
def test_a_named_plan_is_taken_wherever_it_can_run(plan: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 6, dtype=dtype)
    layout = Layout.of(torch.tensor([1, 8]), (4, 6))
    if plan != "native" or native.fits(weight):
        assert plan_named(plan, layout, weight) == (PLANS[plan], "asked for")
    else:
        with pytest.raises(UserError, match="^backward native cannot run here: .*; use auto$"):
            plan_named(plan, layout, weight)


@pytest.mark.parametrize("plan", list(PLANS))
def test_as_many_touched_rows_as_inputs_are_not_all_rows(plan: str) -> None:
    indices_K = torch.tensor([1, 4 * 4 + 2, 7 * 4, 10 * 4 + 3], dtype=torch.int32)  # four of twelve rows, four inputs
    x_TI, grad_TO = torch.randn(5, 4), torch.randn(5, 12)
    found_K = PLANS[plan].entries(whole(x_TI), grad_TO, Layout.of(indices_K, (12, 4)))
    assert relative(found_K, weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)) <= 1e-5


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("plan", list(PLANS))
def test_input_and_gradient_need_not_be_of_one_dtype(plan: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, grad_y, indices_K = case("odd_sizes", torch.float32)
    x_TI, grad_TO = x.reshape(-1, x.shape[-1]).to(dtypes[0]), grad_y.reshape(-1, grad_y.shape[-1]).to(dtypes[1])
    found_K = PLANS[plan].entries(whole(x_TI), grad_TO, Layout.of(indices_K, (weight.shape[0], weight.shape[1])))
    assert relative(found_K, weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)) <= TOLERANCE[torch.bfloat16]
