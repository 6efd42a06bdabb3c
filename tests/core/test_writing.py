"""Writing into weights in place: the compiled loops give the bits that PyTorch's own operators give, and take them back."""

from __future__ import annotations

import itertools

import pytest
import torch

from speft_core import writing
from speft_core.ops import native

DTYPES = (torch.float32, torch.bfloat16)
HAS_NATIVE = native.reason() == ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _case(weight_dtype: torch.dtype, values_dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, sorted indices and values with every awkward number: zeros of both signs, NaN, infinity, subnormals."""
    made = torch.Generator().manual_seed(count)
    weight = torch.randn(211, 307, generator=made)
    values_K = torch.randn(count, generator=made) * 10.0 ** torch.randint(-8, 8, (count,), generator=made)
    indices_K = torch.randperm(weight.numel(), generator=made)[:count].sort().values.to(torch.int32)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, 3.3e38])[:count]
    values_K[: odd.numel()] = odd
    weight.view(-1)[indices_K[-odd.numel() :].long()] = odd.flip(0)
    return weight.to(weight_dtype), indices_K, values_K.to(values_dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 40_000])
@pytest.mark.parametrize(("weight_dtype", "values_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_compiled_and_plain_writes_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, weight_dtype: torch.dtype, values_dtype: torch.dtype, count: int
) -> None:
    weight, indices_K, values_K = _case(weight_dtype, values_dtype, count)
    assert native.writes(weight, indices_K, values_K) == HAS_NATIVE
    fast = weight.clone()
    held_K = writing.exchange(fast, indices_K, values_K)
    added = weight.clone()
    writing.write_sum(added, indices_K, held_K, values_K)
    taken = fast.clone()
    writing.scatter(taken, indices_K, held_K)

    monkeypatch.setattr(native, "writes", lambda *_: False)
    plain = weight.clone()
    base_K = writing.exchange(plain, indices_K, values_K)
    assert torch.equal(_bits(held_K), _bits(base_K))
    usual = ~torch.isnan(plain)  # a NaN may have any payload
    for made in (fast, added):
        assert torch.equal(_bits(made)[usual], _bits(plain)[usual])
        assert bool(torch.isnan(made[~usual]).all())
    assert torch.equal(_bits(taken), _bits(weight))


def test_what_the_compiled_loops_cannot_take_goes_the_plain_way() -> None:
    weight, indices_K, values_K = _case(torch.float32, torch.float32, 100)
    for indices, values in ((indices_K.long(), values_K), (indices_K, values_K.double()), (indices_K, values_K.repeat(2)[::2])):
        assert not native.writes(weight, indices, values)
        changed = weight.clone()
        base_K = writing.exchange(changed, indices, values)
        writing.scatter(changed, indices, base_K)
        assert torch.equal(_bits(changed), _bits(weight))
