"""Layouts and inputs: each entry's place, whatever columns of x were kept, in whatever factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout

SIZES = st.integers(1, 7)


@st.composite
def masks(draw: st.DrawFn) -> tuple[list[int], tuple[int, int]]:
    """Sorted flat indices into a small weight, and its shape."""
    shape = draw(SIZES), draw(SIZES)
    return sorted(draw(st.sets(st.integers(0, shape[0] * shape[1] - 1)))), shape


@given(masks())
def test_rows_columns_and_places_give_the_indices_back(mask: tuple[list[int], tuple[int, int]]) -> None:
    indices, shape = mask
    layout = Layout.of(torch.tensor(indices, dtype=torch.int64), shape)
    rows, columns = [sorted({i // shape[1] for i in indices}), sorted({i % shape[1] for i in indices})]
    assert layout.rows_R.tolist() == rows and layout.cols_C.tolist() == columns
    assert [rows[r] * shape[1] + columns[c] for r, c in zip(layout.row_of_K.tolist(), layout.col_of_K.tolist(), strict=True)] == indices
    first = layout.first_R.tolist()
    assert [indices[a:b] for a, b in zip(first[:-1], first[1:], strict=True)] == [[i for i in indices if i // shape[1] == r] for r in rows]
    assert first[0] == 0 and first[-1] == layout.nnz == len(indices)
    assert layout.touched_area == len(rows) * len(columns) / (shape[0] * shape[1])
    assert {t.dtype for t in (layout.rows_R, layout.cols_C, layout.row_of_K, layout.col_of_K)} == {torch.int32}
    assert layout.first_R.dtype == torch.int64


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_a_weight_without_elements_has_an_empty_layout(shape: tuple[int, int]) -> None:
    layout = Layout.of(torch.empty(0, dtype=torch.int32), shape)
    assert layout.nnz == 0 and layout.touched_area == 0 and layout.first_R.tolist() == [0]


@pytest.mark.parametrize(("rows", "dtype"), [(2**16 - 1, torch.int32), (2**16, torch.int64), (2**20, torch.int64)])
def test_indices_are_wide_from_two_to_the_31_elements_on(rows: int, dtype: torch.dtype) -> None:
    last = rows * 2**15 - 1
    layout = Layout.of(torch.tensor([5, last]), (rows, 2**15))
    assert layout.rows_R.tolist() == [0, rows - 1] and layout.cols_C.tolist() == [5, 2**15 - 1]
    assert {t.dtype for t in (layout.rows_R, layout.cols_C, layout.row_of_K, layout.col_of_K)} == {dtype}


def test_what_is_derived_is_made_once_and_not_moved() -> None:
    layout = Layout.of(torch.tensor([1, 5, 6]), (3, 4))
    made: list[str] = []

    def make(what: str) -> str:
        made.append(what)
        return what

    assert [layout.derived(key, lambda key=key: make(key)) for key in "abab"] == ["a", "b", "a", "b"]
    assert made == ["a", "b"]
    moved = layout.to(torch.device("meta"))
    for name in ("rows_R", "cols_C", "row_of_K", "col_of_K"):
        here, there = getattr(layout, name), getattr(moved, name)
        assert there.device.type == "meta" and here.device.type == "cpu"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)
    assert moved.shape == layout.shape and torch.equal(moved.first_R, layout.first_R)
    assert moved.derived("a", lambda: make("again")) == "again" and layout.derived("a", lambda: make("never")) == "a"


@given(masks(), st.data())
def test_whatever_columns_are_kept_the_layouts_own_are_found(mask: tuple[list[int], tuple[int, int]], data: st.DataObject) -> None:
    """x as one factor or a product of three, rounded after each; kept whole, as the layout's columns, or as more than those."""
    indices, shape = mask
    layout = Layout.of(torch.tensor(indices, dtype=torch.int64), shape)
    more = data.draw(st.sets(st.integers(0, shape[1] - 1)))
    union_U = torch.tensor(sorted({*layout.cols_C.tolist(), *more}), dtype=layout.cols_C.dtype)
    factors = [(torch.randn(3, shape[1]), dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)]
    for count in (1, 3):
        x_TI = factors[0][0]
        for factor, dtype in factors[1:count]:
            x_TI = (x_TI * factor).to(dtype)
        expected_TC = x_TI[:, layout.cols_C.long()]
        for columns_U, key in ((None, None), (layout.cols_C, "own"), (union_U, ("union", count))):
            kept = [(f if columns_U is None else f[:, columns_U.long()], dtype) for f, dtype in factors[:count]]
            for _ in range(2):  # the places are remembered
                inputs = Inputs(kept, columns_U, key)
                found_TC = inputs.gather(inputs.picks(layout))
                assert found_TC.dtype == expected_TC.dtype and torch.equal(found_TC, expected_TC)
            assert Inputs(kept, columns_U, key).places(layout).dtype == layout.cols_C.dtype == torch.int32
            places = Inputs(kept, columns_U, key).places(layout).tolist()
            assert [columns_U[p] if columns_U is not None else p for p in places] == layout.cols_C.tolist()


def test_the_first_factor_is_rounded_too() -> None:
    x_TI = torch.randn(4, 3)
    layout = Layout.of(torch.tensor([0, 2]), (1, 3))
    inputs = Inputs([(x_TI, torch.bfloat16)])
    assert torch.equal(inputs.gather(inputs.picks(layout)), x_TI[:, [0, 2]].bfloat16())
    assert torch.equal(inputs.gather(None), x_TI.bfloat16())
