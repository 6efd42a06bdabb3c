"""SparseDelta: dense and back, and the checks that stand between a file and a weight."""

from __future__ import annotations

import pytest
import torch

from speft_core import SparseDelta, UserError
from speft_core import delta as module
from speft_core.delta import VALUE_DTYPES, all_finite, check_indices


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


def test_what_passed_is_looked_at_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    check = module.check_indices
    monkeypatch.setattr(module, "check_indices", lambda name, *rest: (looked.append(name), check(name, *rest)))
    delta = SparseDelta(torch.tensor([1, 5]), torch.ones(2), (2, 3))
    assert delta.check("a") is delta and delta.check("b") is delta and looked == ["a"]
    delta.values_K[0] = 3.0
    assert delta.check("c") is delta and delta.check("d") is delta and looked == ["a", "c"]
    delta.indices_K[0] = 5
    for name in ("e", "f"):  # what failed has not passed
        with pytest.raises(UserError, match=f"^{name}: indices must be sorted without duplicates, they are not$"):
            delta.check(name)
    with torch.inference_mode():  # changes are not counted there
        uncounted = SparseDelta(torch.tensor([1, 5]), torch.ones(2), (2, 3))
    assert uncounted.check("g") is uncounted.check("h") and looked[-2:] == ["g", "h"]
    halves = SparseDelta(torch.tensor([1, 5]), uncounted.values_K, (2, 3))
    assert halves.check("i") is halves.check("j") and looked[-2:] == ["i", "j"]


def test_values_alone_can_be_checked() -> None:
    unsorted = SparseDelta(torch.tensor([5, 1]), torch.ones(2), (2, 3))
    assert unsorted.check_values("w") is unsorted
    with pytest.raises(UserError, match=r"^delta: values must be finite, got NaN or infinity$"):
        SparseDelta(torch.tensor([5]), torch.tensor([float("nan")]), (2, 3)).check_values()
    with pytest.raises(UserError, match=r"^delta: indices must be 1-D int32 or int64, got torch.int16 of shape \(1,\)$"):
        SparseDelta(torch.tensor([5], dtype=torch.int16), torch.ones(1), (2, 3)).check()
    with pytest.raises(UserError, match=r"^w: values must be .*, one per index \(2\), got torch.float32 of shape \(1, 2\)$"):
        SparseDelta(torch.tensor([1, 5]), torch.ones(1, 2), (2, 3)).check_values("w")


@pytest.mark.parametrize(("indices", "got"), [([3, -2, 4], "-2 to 4"), ([0, 6, 5], "0 to 6"), ([-1, 7], "-1 to 7"), ([6], "6 to 6")])
def test_the_worst_indices_are_named(indices: list[int], got: str) -> None:
    with pytest.raises(UserError, match=rf"^w: indices must lie in \[0, 6\) for shape \(2, 3\), got {got}$"):
        check_indices("w", torch.tensor(indices), (2, 3))
    check_indices("w", torch.tensor([0, 5]), (2, 3))
    check_indices("w", torch.empty(0, dtype=torch.int32), (0,))


def test_a_delta_moves_as_a_whole_and_keeps_its_kind() -> None:
    delta = SparseDelta(torch.tensor([1, 5], dtype=torch.int32), torch.ones(2, dtype=torch.float16), torch.Size([2, 3]))
    assert type(delta.shape) is tuple and {type(n) for n in delta.shape} == {int}
    moved = delta.to(device="meta")
    assert (moved.indices_K.device.type, moved.values_K.device.type) == ("meta", "meta")
    assert (moved.values_K.dtype, moved.indices_K.dtype, moved.shape) == (torch.float16, torch.int32, (2, 3))
    assert delta.to_dense().dtype == torch.float16
    assert moved.to_dense().device.type == "meta"
    scalar = SparseDelta.from_dense(torch.tensor(2.0))
    assert scalar.indices_K.tolist() == [0] and scalar.indices_K.dtype == torch.int32 and scalar.shape == ()
    assert scalar.check().to_dense().item() == 2.0


def test_numbers_of_other_kinds_are_finite_by_their_value() -> None:
    assert all_finite(torch.tensor([1, 2])) and all_finite(torch.empty(0, dtype=torch.complex64))
    assert all_finite(torch.tensor([1 + 2j])) and not all_finite(torch.tensor([complex(1, float("inf"))]))
    assert all_finite(torch.ones(2, requires_grad=True))
