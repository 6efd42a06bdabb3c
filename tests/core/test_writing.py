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
    base_K = writing.gather(weight, indices_K)
    assert native.writes((weight, indices_K, base_K, values_K)) == HAS_NATIVE
    fast = weight.clone()
    writing.write_sum(fast, indices_K, base_K, values_K)
    back = fast.clone()
    writing.scatter(back, indices_K, base_K)
    assert torch.equal(_bits(back), _bits(weight))

    monkeypatch.setattr(native, "writes", lambda *_: False)
    assert torch.equal(_bits(writing.gather(weight, indices_K)), _bits(base_K))
    plain = weight.clone()
    writing.write_sum(plain, indices_K, base_K, values_K)
    usual = ~torch.isnan(plain)  # a NaN may have any payload
    assert torch.equal(_bits(fast)[usual], _bits(plain)[usual]) and bool(torch.isnan(fast[~usual]).all())
    assert count < 8 or not torch.equal(_bits(fast), _bits(weight))  # the first few values are odd ones, as 0
    writing.scatter(plain, indices_K, base_K)
    assert torch.equal(_bits(plain), _bits(weight))


def test_many_tensors_at_once_are_each_as_alone() -> None:
    cases = [_case(dtype, torch.float32, count) for dtype in (*DTYPES, torch.float64) for count in (0, 3, 500, 40_000)]
    together, alone = ([weight.clone() for weight, *_ in cases] for _ in range(2))
    entries = writing.Entries([(weight, *case[1:]) for weight, case in zip(together, cases, strict=True)])
    entries.add()
    for weight, (_, indices_K, values_K), base_K in zip(alone, cases, entries.base, strict=True):
        before_K = writing.gather(weight, indices_K)
        assert before_K.nan_to_num().equal(base_K.nan_to_num())
        writing.write_sum(weight, indices_K, before_K, values_K)
    assert all(a.nan_to_num().equal(b.nan_to_num()) for a, b in zip(together, alone, strict=True))
    moved = [weight.clone() for weight in together]
    for weights in (together, moved):  # where they were, and elsewhere
        entries.put_back(weights)
        assert all(w.nan_to_num().equal(before.nan_to_num()) for w, (before, *_) in zip(weights, cases, strict=True))


def test_what_the_compiled_loops_cannot_take_goes_the_plain_way() -> None:
    weight, indices_K, values_K = _case(torch.float32, torch.float32, 100)
    base_K = writing.gather(weight, indices_K)
    for indices, values in ((indices_K.long(), values_K), (indices_K, values_K.double()), (indices_K, values_K.repeat(2)[::2])):
        assert not native.writes((weight, indices, base_K, values))
        changed = weight.clone()
        writing.write_sum(changed, indices, base_K, values)
        assert not torch.equal(_bits(changed), _bits(weight))
        writing.scatter(changed, indices, base_K)
        assert torch.equal(_bits(changed), _bits(weight))


@pytest.mark.parametrize("wrong", [-1, 64, 2**31 - 1])
def test_an_index_outside_raises_and_writes_nowhere(wrong: int) -> None:
    room = torch.arange(3 * 64, dtype=torch.float32)
    weight, before = room[64:128].view(8, 8), room.clone()
    indices_K = torch.tensor([0, wrong], dtype=torch.int32)
    with pytest.raises((IndexError, RuntimeError)):
        writing.gather(weight, indices_K)
    with pytest.raises((IndexError, RuntimeError)):
        writing.scatter(weight, indices_K, torch.zeros(2))
    assert torch.equal(room[:64], before[:64]) and torch.equal(room[128:], before[128:])


@pytest.mark.parametrize("moved", ["nothing", "weight", "values", "dtype"])
def test_a_sum_written_again_and_again_follows_what_moves(moved: str) -> None:
    weight, indices_K, values_K = _case(torch.float32, torch.float32, 1000)
    weight, values_K = torch.nn.Parameter(weight, requires_grad=False), torch.nn.Parameter(values_K)
    written = writing.Sum()
    base_K = writing.gather(weight, indices_K)
    written.write(weight, indices_K, base_K, values_K)
    if moved == "weight":
        weight.data = weight.data.clone()
    elif moved == "dtype":
        weight.data, base_K = weight.data.bfloat16(), base_K.bfloat16()
    elif moved == "values":
        values_K.data = values_K.data * 2
    else:
        values_K.data.mul_(2)
    with torch.no_grad():
        written.write(weight, indices_K, base_K, values_K)
    found_K, expected_K = writing.gather(weight, indices_K), writing.add_values(base_K, values_K)
    usual_K = ~torch.isnan(expected_K)  # a NaN may have any payload
    assert torch.equal(_bits(found_K)[usual_K], _bits(expected_K)[usual_K]) and bool(torch.isnan(found_K[~usual_K]).all())
