"""SparseDelta: dense and back, and the checks that stand between a file and a weight."""

from __future__ import annotations

import pytest
import torch

from speft_core import SparseDelta, UserError
from speft_core.delta import VALUE_DTYPES, all_finite


def test_dense_round_trip_is_exact() -> None:
    dense = torch.randn(7, 11) * (torch.rand(7, 11) < 0.3)
    delta = SparseDelta.from_dense(dense)
    assert delta.nnz == int((dense != 0).sum())
    assert delta.numel == 77
    assert torch.equal(delta.check("w").to_dense(), dense)


def test_to_changes_values_alone() -> None:
    delta = SparseDelta(torch.tensor([1, 5], dtype=torch.int32), torch.tensor([1.0, 2.0]), (2, 3))
    moved = delta.to(dtype=torch.bfloat16)
    assert moved.values_K.dtype == torch.bfloat16
    assert moved.indices_K.dtype == torch.int32
    assert delta.values_K.dtype == torch.float32


@pytest.mark.parametrize(
    ("indices", "values", "rule"),
    [
        (torch.tensor([-1, 2]), torch.ones(2), r"\[0, 6\)"),
        (torch.tensor([1, 6]), torch.ones(2), r"\[0, 6\)"),
        (torch.tensor([2, 1]), torch.ones(2), "sorted without duplicates"),
        (torch.tensor([2, 2]), torch.ones(2), "sorted without duplicates"),
        (torch.tensor([1.0, 2.0]), torch.ones(2), "int32 or int64"),
        (torch.tensor([[1, 2]]), torch.ones(1, 2), "1-D"),
        (torch.tensor([1, 2]), torch.ones(3), "one per index"),
        (torch.tensor([1, 2]), torch.ones(2, dtype=torch.int32), "floating point"),
        (torch.tensor([1, 2]), torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([1, 2]), torch.tensor([float("inf"), 1.0]), "finite"),
    ],
)
def test_bad_deltas_are_refused_by_name(indices: torch.Tensor, values: torch.Tensor, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        SparseDelta(indices, values, (2, 3)).check("layer.weight")
    assert str(caught.value).startswith("layer.weight: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_finiteness_is_told_by_the_bits(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    fine = torch.tensor([0.0, -0.0, largest, -largest, torch.finfo(dtype).tiny, 1e-30], dtype=torch.float64).to(dtype)
    assert all_finite(fine) and all_finite(fine[:0]) and all_finite(fine.expand(3, 6)[:, ::2])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.cat([fine, torch.tensor([bad], dtype=dtype)]))
