"""The order of the examples: the same at any number of processes, whole batches, every example as often as any other."""

from __future__ import annotations

from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from speft_core import UserError
from speft_train.sampler import GlobalBatches, steps_in_all


def seen_by_step(order: GlobalBatches, world: int, per_device: int) -> list[set[int]]:
    """Examples of each optimizer step over all ranks, as accelerate deals them out."""
    ranks = [list(BatchSamplerShard(BatchSampler(order, per_device, drop_last=True), world, rank)) for rank in range(world)]
    accumulation = order.batch // (world * per_device)
    steps = len(ranks[0]) // accumulation
    return [
        {i for rank in ranks for micro in rank[s * accumulation : (s + 1) * accumulation] for i in micro} for s in range(steps)
    ]


@pytest.mark.parametrize("size", [16, 50, 53])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_step_sees_the_same_examples_at_any_world_size(size: int, grouped: bool) -> None:
    lengths = [(7 * i) % 31 for i in range(size)] if grouped else None
    order = GlobalBatches(size, 8, seed=3, lengths=lengths)
    alone = seen_by_step(order, 1, 8)
    assert len(alone) == size // 8
    for world, per_device in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        assert seen_by_step(order, world, per_device) == alone


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    order = GlobalBatches(40, 8, seed=0)
    epochs = [order.order(epoch) for epoch in range(3)]
    assert all(Counter(epoch) == Counter(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    order.set_epoch(2)
    assert list(order) == epochs[2]
    assert GlobalBatches(40, 8, seed=1).order(0) != epochs[0]


def test_what_does_not_fill_a_batch_changes_with_the_epoch() -> None:
    order = GlobalBatches(11, 4, seed=0)
    left = [set(range(11)) - set(order.order(epoch)) for epoch in range(20)]
    assert all(len(rest) == 3 for rest in left)
    assert len(set().union(*left)) > 3


def test_grouping_makes_batches_of_like_length() -> None:
    lengths = [(13 * i) % 97 for i in range(97)]
    spread = {}
    for name, given in (("plain", None), ("grouped", lengths)):
        order = GlobalBatches(97, 8, seed=0, lengths=given).order(0)
        batches = [[lengths[i] for i in order[s : s + 8]] for s in range(0, len(order), 8)]
        spread[name] = sum(max(b) - min(b) for b in batches)
    assert spread["grouped"] < spread["plain"] / 4


def test_sequential_order_is_the_file_s() -> None:
    assert list(GlobalBatches(10, 4, seed=0, shuffle=False)) == list(range(8))


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UserError, match="must fill one global batch of 8; got 7"):
        GlobalBatches(7, 8, seed=0)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "steps"), [(-1, 1.0, 5), (-1, 2.5, 13), (-1, 0.1, 1), (3, 1.0, 3), (99, 1.0, 99)]
)
def test_steps_in_all(max_steps: int, epochs: float, steps: int) -> None:
    assert steps_in_all(43, 8, max_steps, epochs) == steps
