"""The order of the examples: the same at any number of processes.

Each epoch is a seeded permutation cut into whole global batches; what does not fill one waits for the next epoch. So
step s sees the same examples whether one process or eight run it, and an epoch has the same number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from speft_core.errors import UserError

# With grouping by length, this many batches are sorted together: enough to even out lengths, and still a shuffle.
BATCHES_SORTED_TOGETHER = 50


class GlobalBatches(torch.utils.data.Sampler[int]):
    """Indices of the examples, epoch by epoch.

    size: number of examples. batch: examples of one optimizer step over all processes. lengths: tokens of each
    example, to put examples of similar length into one batch (less padding); None for a plain shuffle. shuffle: off
    for file order.
    """

    def __init__(self, size: int, batch: int, seed: int, lengths: Sequence[int] | None = None, shuffle: bool = True) -> None:
        require_batch(size, batch)
        self.size, self.batch, self.seed, self.lengths, self.shuffle = size, batch, seed, lengths, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.size // self.batch * self.batch

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch comes next, also when it resumes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """The indices of one epoch."""
        if not self.shuffle:
            return list(range(len(self)))
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        indices: list[int] = torch.randperm(self.size, generator=generator).tolist()[: len(self)]
        if self.lengths is None:
            return indices
        together = self.batch * BATCHES_SORTED_TOGETHER
        batches = []
        for start in range(0, len(indices), together):
            part = sorted(indices[start : start + together], key=self.lengths.__getitem__)
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [index for b in shuffled for index in batches[b]]

    def examples_of(self, step: int) -> list[int]:
        """The examples of an optimizer step (the first is 1), on all processes together."""
        each = len(self) // self.batch
        start = (step - 1) % each * self.batch
        return self.order((step - 1) // each)[start : start + self.batch]


def require_batch(size: int, batch: int) -> None:
    """UserError for data that do not make a single step."""
    if size < batch:
        raise UserError(f"the training data must fill one global batch of {batch}; got {size} examples")


def steps_in_all(size: int, batch: int, max_steps: int, epochs: float) -> int:
    """Optimizer steps of the whole run."""
    return max_steps if max_steps > 0 else math.ceil(epochs * (size // batch))
