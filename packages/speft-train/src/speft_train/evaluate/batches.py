"""Batches of an evaluation that looks at logits: as many examples as asked for, or as many as their logits leave room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

LOGITS = 2**28  # of one batch: 1 GiB in fp32, of which the loss holds about three. A 7B model has 152,000 a token.


def batches(model: Any, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places of examples, longest first: at most `batch_size` of them, and LOGITS logits once padded, but at least one."""
    vocabulary = model.config.get_text_config().vocab_size
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    start = 0
    while start < len(order):
        fit = LOGITS // (max(1, lengths[order[start]]) * vocabulary)
        stop = start + max(1, min(batch_size, fit))
        yield order[start:stop]
        start = stop
