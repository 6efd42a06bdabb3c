"""The index code: every index comes back, in few bytes, and damaged bytes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_core import UserError, gaps


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 2**40), max_size=200), st.integers(0, 70000))
def test_every_sorted_set_comes_back(chosen: set[int], beyond: int) -> None:
    indices_K = torch.tensor(sorted(chosen), dtype=torch.int64)
    numel = (max(chosen) if chosen else 0) + 1 + beyond
    found = gaps.decode(gaps.encode(indices_K), indices_K.numel(), numel)
    assert found.dtype == gaps.index_dtype(numel)
    assert torch.equal(found.long(), indices_K)


@pytest.mark.parametrize("last", [0, 254, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**50])
def test_one_index_at_each_width_boundary(last: int) -> None:
    indices_K = torch.tensor([last])
    assert gaps.decode(gaps.encode(indices_K), 1, last + 1).tolist() == [last]


@pytest.mark.parametrize(("density", "bytes_each"), [(0.05, 1.14), (0.005, 1.19), (0.0005, 2.06), (1e-4, 2.15)])
def test_bytes_an_index_for_uniform_positions(density: float, bytes_each: float) -> None:
    numel = 4_000_000
    generator = torch.Generator().manual_seed(0)
    indices_K = torch.nonzero(torch.rand(numel, generator=generator) < density).flatten()
    assert gaps.encode(indices_K).numel() / indices_K.numel() <= bytes_each


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 2**62))
def test_any_bytes_are_decoded_to_valid_indices_or_refused(raw: bytes, count: int, numel: int) -> None:
    code = torch.tensor(list(raw), dtype=torch.uint8)
    try:
        found = gaps.decode(code, count, numel)
    except UserError:
        return
    assert found.numel() == count
    if count:
        assert int(found[0]) >= 0
        assert int(found[-1]) < numel
        assert bool((found[1:] > found[:-1]).all())


@pytest.mark.parametrize("change", ["truncated", "longer", "wrong width", "other dtype", "too small a tensor", "not empty"])
def test_damage_is_named(change: str) -> None:
    code, count, numel = gaps.encode(torch.arange(0, 3000, 3)), 1000, 3000
    if change == "truncated":
        code = code[:-30]
    elif change == "longer":
        code = torch.cat([code, torch.zeros(9, dtype=torch.uint8)])
    elif change == "wrong width":
        code = torch.cat([torch.tensor([3], dtype=torch.uint8), code[1:]])
    elif change == "other dtype":
        code = code.int()
    elif change == "too small a tensor":
        numel = 2990
    else:
        count = 0
    with pytest.raises(UserError, match="gaps|indices"):
        gaps.decode(code, count, numel)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64])
def test_high_parts_that_are_all_zero_or_all_carried(count: int) -> None:
    for gap in (1, 255, 256, 300, 700):
        indices_K = torch.arange(1, count + 1) * gap
        numel = int(indices_K[-1]) + 1
        assert torch.equal(gaps.decode(gaps.encode(indices_K), count, numel).long(), indices_K)
        assert gaps.decode(gaps.encode(indices_K), count, 2**33).dtype == torch.int64


def test_ones_after_the_last_zero_and_spare_bytes_are_refused() -> None:
    code = torch.tensor([1, 5, 7, 0b0000_0100], dtype=torch.uint8)  # two gaps, no high parts, a one in the padding
    for damaged in (code, torch.tensor([1, 5, 7, 0, 0], dtype=torch.uint8), torch.tensor([1, 5, 7], dtype=torch.uint8)):
        with pytest.raises(UserError, match="gaps are damaged"):
            gaps.decode(damaged, 2, 10_000)
    assert gaps.decode(torch.tensor([1, 5, 7, 0], dtype=torch.uint8), 2, 10_000).tolist() == [5, 12]
    assert gaps.decode(torch.tensor([1, 5, 7, 0b010], dtype=torch.uint8), 2, 10_000).tolist() == [5, 268]
