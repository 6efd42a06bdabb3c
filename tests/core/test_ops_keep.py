"""What forward keeps of an input: its own columns, those of all readers once they have met, or the input itself."""

from __future__ import annotations

import pytest
import torch

from speft_core.ops import keep
from speft_core.ops.functions import SparseLinear, Work
from speft_core.ops.keep import Keeper, kept_columns
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS
from speft_core.ops.reference import weight_gradient_entries


def layout_of(columns: list[int], width: int = 10) -> Layout:
    return Layout.of(torch.tensor(sorted(columns)), (1, width))


@pytest.mark.parametrize("kept", [8, 9, 10])
@pytest.mark.parametrize("keeper_dtype", [None, torch.float32, torch.bfloat16])
def test_from_nine_tenths_on_the_input_itself_is_kept_unless_it_is_rounded(kept: int, keeper_dtype: torch.dtype | None) -> None:
    x, layout = torch.randn(2, 3, 10), layout_of(list(range(kept)))
    keeper = Keeper(layout.cols_C, keeper_dtype)
    found, columns_U, key = kept_columns(x, x, layout, keeper)
    if kept >= 9 and keeper_dtype != torch.bfloat16:
        assert (columns_U, key) == (None, None) and found.data_ptr() == x.data_ptr() and found.shape == (6, 10)
    else:
        assert columns_U is layout.cols_C and key == "own" and found.data_ptr() != x.data_ptr()
        assert torch.equal(found, x.reshape(6, 10)[:, :kept].to(keeper_dtype or torch.float32))
    alone, columns_U, _ = kept_columns(x, x.bfloat16(), layout, None)  # under autocast: what the layer read
    assert alone.dtype == torch.bfloat16 and (columns_U is None) == (kept >= 9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_readers_of_one_input_keep_its_columns_once_they_have_met(dtype: torch.dtype | None) -> None:
    layouts = [layout_of(c) for c in ([1, 4], [4, 2], [7])]
    keepers = [Keeper(layout.cols_C, dtype) for layout in layouts]
    for _ in range(2):  # in the first forward they meet, one after the other
        x = torch.randn(5, 10)
        first = [kept_columns(x, x, layout, keeper) for layout, keeper in zip(layouts, keepers, strict=True)]
        for (found, columns_U, _), layout in zip(first, layouts, strict=True):
            assert columns_U is not None
            assert torch.equal(found, x[:, columns_U.long()].to(dtype or torch.float32))
            assert set(layout.cols_C.tolist()) <= set(columns_U.tolist()) <= {1, 2, 4, 7}
    assert [r for k in keepers for r in k.readers or []] == keepers * 3
    assert len({id(found) for found, _, _ in first}) == 1 and len({id(columns) for _, columns, _ in first}) == 1
    assert first[0][1] is not None and first[0][1].tolist() == [1, 2, 4, 7] and {key for _, _, key in first} == {("union", 3)}
    x.add_(1.0)  # what was left on the tensor is of its old content
    again, columns_U, _ = kept_columns(x, x, layouts[2], keepers[2])
    assert columns_U is not None and torch.equal(again, x[:, columns_U.long()].to(dtype or torch.float32))
    other = kept_columns(x, x, layouts[0], Keeper(layouts[0].cols_C))
    assert other[0].shape == (5, 2) and other[2] == "own"  # a newcomer has met no one yet
    y = torch.randn(5, 10)
    assert kept_columns(y, y, layouts[1], keepers[1])[2] == ("union", 3)


def test_readers_that_keep_another_dtype_do_not_share() -> None:
    layouts = [layout_of([1, 4]), layout_of([2])]
    keepers = [Keeper(layouts[0].cols_C), Keeper(layouts[1].cols_C, torch.bfloat16)]
    for _ in range(2):
        x = torch.randn(5, 10)
        found = [kept_columns(x, x, layout, keeper)[0] for layout, keeper in zip(layouts, keepers, strict=True)]
    assert [f.dtype for f in found] == [torch.float32, torch.bfloat16] and [f.shape[1] for f in found] == [3, 3]


def test_under_checkpointing_each_keeps_its_own_and_meets_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "hooks_forbid", lambda: True)
    layouts = [layout_of([1]), layout_of([2])]
    keepers = [Keeper(torch.empty(0, dtype=torch.int32)) for _ in layouts]
    for _ in range(2):
        x = torch.randn(5, 10)
        for layout, keeper in zip(layouts, keepers, strict=True):
            found, columns_U, key = kept_columns(x, x, layout, keeper)
            assert columns_U is layout.cols_C and key == "own" and torch.equal(found, x[:, layout.cols_C.long()])
            assert keeper.cols_C is layout.cols_C and keeper.readers is None  # where the layout is now, on any device
    assert not x.__dict__


def test_a_layer_that_joins_later_has_its_columns_kept_too() -> None:
    x = torch.randn(3, 8)
    first, second, third = (Keeper(torch.tensor(columns, dtype=torch.int32)) for columns in ([0, 2], [2, 5], [7]))
    for keeper in (first, second):
        keeper.meet(x)
    assert first.columns()[0].tolist() == [0, 2, 5] and second.columns()[0] is first.columns()[0]
    third.meet(x)
    for keeper in (second, third, first):
        columns_U, key = keeper.columns()
        assert columns_U.tolist() == [0, 2, 5, 7] and key == ("union", 3)
        assert columns_U is first.columns()[0]


@pytest.mark.parametrize("plan", list(PLANS))
def test_columns_kept_for_others_too_change_no_gradient(plan: str) -> None:
    """One layer reads an input alone, then with a second, then with a third layer: each time other columns are kept."""
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    entries = {name: torch.tensor(places, dtype=torch.int32) for name, places in (("a", [3, 10, 13]), ("b", [0, 6]), ("c", [9, 17]))}
    layouts = {name: Layout.of(indices_K, (4, 8)) for name, indices_K in entries.items()}
    keepers = {name: Keeper(layout.cols_C) for name, layout in layouts.items()}
    total, found = torch.zeros(()), []
    for name in ("a", "b", "a", "c", "a"):
        values_K, seed = torch.zeros(entries[name].numel(), requires_grad=True), torch.randn(6, 4)
        y = SparseLinear.apply(x, weight, None, values_K, Work(PLANS[plan], layouts[name], keepers[name]))
        total = total + (y * seed).sum()
        found.append((name, values_K, seed))
    total.backward()
    for name, values_K, seed in found:
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, weight_gradient_entries(x, seed, entries[name]), rtol=1e-5, atol=1e-5)


def test_under_autocast_columns_are_kept_as_the_product_read_them() -> None:
    x, weight, values_K = torch.randn(6, 8), torch.randn(4, 8), torch.zeros(3, requires_grad=True)
    layout, saved = Layout.of(torch.tensor([3, 10, 13]), (4, 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = SparseLinear.apply(x, weight, None, values_K, Work(PLANS["compact"], layout))
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in saved if t.shape == (6, 3)] == [torch.bfloat16]
    assert [t.dtype for t in saved if t.shape == weight.shape] == [torch.float32]  # the weight itself, no copy
