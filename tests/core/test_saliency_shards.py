"""Sums in shards: every batch of every rank has its part in each exchange, whatever can be told apart in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from speft_core.saliency.accumulate import Rule, accumulating
from speft_core.saliency.peers import Peers
from speft_core.saliency.sums import Accumulator

NAMES = ["0.weight", "0.bias", "1.weight"]
Said = list[tuple[tuple[int, ...], bool]]


class OneRank(Peers):
    """Notes each exchange, which the other ranks would wait for: the term's shape and whether it holds anything."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.said: Said = []

    def exchange(self, term: torch.Tensor) -> torch.Tensor:
        self.said.append((tuple(term.shape), bool(term.any())))
        return term


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


APART, MERGED = draw(3, 2, 6), draw(1, 6, 6)  # three examples, and the positions of all three in one row


def exchanges(given: list[torch.Tensor], calls: int = 1, per_example: bool = True) -> tuple[list[Said], set[str], dict[str, torch.Tensor]]:
    """What each batch exchanged, which targets got no example's own gradient, the sums. calls: of the model in a batch."""
    torch.manual_seed(0)
    model, peers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), OneRank()
    sums = {name: Accumulator(name, model.get_parameter(name)) for name in NAMES}
    for total in sums.values():
        total.is_shard, total._peers, total.sum = True, peers, total.sum.reshape(-1)
    said = []
    with accumulating(model, sums, Rule(torch.square if per_example else None)) as examples:
        for x in given:
            examples.count, examples.length = 3, 2
            examples.added.clear()
            sum(model(x.clone().requires_grad_()).sum() for _ in range(calls)).backward()  # type: ignore[union-attr]
            said.append(peers.said)
            peers.said = []
    return said, examples.mixed, {name: total.sum for name, total in sums.items()}


def test_a_batch_whose_examples_cannot_be_told_apart_adds_zeros() -> None:
    (apart,), mixed, expected = exchanges([APART])
    assert len(apart) == len(NAMES) and all(filled for _, filled in apart) and not mixed
    zeros = [(shape, False) for shape, _ in apart]
    said, mixed, sums = exchanges([APART, MERGED])
    assert said == [apart, zeros] and mixed == set(NAMES)
    assert all(torch.equal(total, expected[name]) for name, total in sums.items())


@pytest.mark.parametrize("given", [[MERGED, APART], [APART, MERGED]])
@pytest.mark.parametrize("calls", [1, 2])
def test_each_batch_exchanges_each_sum_once(given: list[torch.Tensor], calls: int) -> None:
    """Also the batches after one that could not be told apart, or in which a module was called again: other ranks may have had none."""
    shapes = [shape for shape, _ in exchanges([APART])[0][0]]
    said, mixed, _ = exchanges(given, calls)
    assert [sorted(shape for shape, _ in batch) for batch in said] == [sorted(shapes)] * 2 and mixed == set(NAMES)
    if calls == 1:
        assert [[shape for shape, _ in batch] for batch in said] == [shapes] * 2  # and in the same order


def test_plain_sums_take_what_comes() -> None:
    said, mixed, _ = exchanges([APART, MERGED], per_example=False)
    assert [len(batch) for batch in said] == [3, 3] and all(filled for batch in said for _, filled in batch) and not mixed
