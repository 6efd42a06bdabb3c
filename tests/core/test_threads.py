"""Work side by side: the results in order, the first failure in order, the same bits as one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from speft_core import SparseAdapter, SparseDelta, UserError
from speft_core.fingerprint import fingerprint
from speft_core.random_mask import random_indices
from speft_core.threads import each


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_results_in_order_from_more_than_one_thread(two_threads: None) -> None:
    seen = set()

    def work(number: int) -> int:
        seen.add(threading.current_thread().name)
        time.sleep(0.002 * (5 - number % 5))
        return number * number

    assert each(work, range(20)) == [n * n for n in range(20)]
    assert len(seen) == 2
    assert each(work, []) == []


def test_the_first_failure_in_order_is_raised(two_threads: None) -> None:
    def work(number: int) -> int:
        time.sleep(0.02 if number == 3 else 0)
        if number in (3, 4):
            raise UserError(f"number {number}")
        return number

    with pytest.raises(UserError, match="number 3"):
        each(work, range(10))


def model_and_adapter() -> tuple[nn.Module, SparseAdapter]:
    model = nn.Sequential(*(nn.Linear(300, 200, bias=False, dtype=torch.bfloat16) for _ in range(6)))
    deltas, prints = {}, {}
    for name, weight in model.named_parameters():
        indices_K = random_indices(0, name, weight.numel(), 3000)
        deltas[name] = SparseDelta(indices_K, torch.randn(3000).bfloat16(), tuple(weight.shape))
        prints[name] = fingerprint(weight, indices_K)
    return model, SparseAdapter(deltas, fingerprint=prints)


def test_load_and_apply_give_the_same_bits_on_any_number_of_threads(tmp_path: Path, two_threads: None) -> None:
    model, adapter = model_and_adapter()
    adapter.save(tmp_path)
    before = [p.detach().clone() for p in model.parameters()]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with SparseAdapter.load(tmp_path).applied(model):
            found.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], before, strict=True))


def test_another_base_is_named_by_its_first_tensor_and_left_alone(two_threads: None) -> None:
    model, adapter = model_and_adapter()
    for layer in (2, 4):
        model[layer].weight.data += 1
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"2\.weight has other values"):
        adapter.apply(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
