"""A bf16 product by AMX in pieces of fewer tokens, where the library is faster at those and the bits are the same.

oneDNN gives some shapes one thread: of two threads 1,024 tokens x 1536 x 576 have one and 512 tokens both, so that two halves take
1.18 ms and the whole 1.64 (`python benchmarks/products.py`, docs/performance.md). Which shapes these are depends on the number of
threads and on oneDNN's version, so each shape that comes again is tried once, on the clock. Pieces are taken only if they gave the
whole product's bits, so no result depends on a clock.

Shape suffixes: T tokens, M what is summed over, N columns of the product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

PIECE_TOKENS = 512  # the most tokens of a piece
TRIED_AT = 3  # the call of a shape at which it is tried: batches of ever other lengths are not worth it
ROUNDS = 6  # of a trial, each in the other order
FASTER = 0.9  # the share of the whole product's time that pieces must stay below

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_calls: dict[tuple[int, ...], int] = {}  # a product's sizes, strides and threads -> how often it was asked for, before its trial
_better: dict[tuple[int, ...], bool] = {}  # -> whether pieces are better


def product(left: torch.Tensor, right_MN: torch.Tensor, whole: Product) -> torch.Tensor:
    """`whole(left, right_MN)`, which is [..., M] times [M, N], with its bits."""
    plain = type(left) is torch.Tensor and left.dtype == right_MN.dtype == torch.bfloat16 and left.is_cpu
    if not (plain and left.is_contiguous()):
        return whole(left, right_MN)
    tokens, (summed, columns) = left.numel() // max(1, left.shape[-1]), right_MN.shape
    if tokens <= PIECE_TOKENS or not summed or (torch.is_grad_enabled() and (left.requires_grad or right_MN.requires_grad)):
        return whole(left, right_MN)
    key = (tokens, summed, columns, *right_MN.stride(), torch.get_num_threads())
    better = _better.get(key)
    if better is None:
        better = _tried(key, left, right_MN, whole)
    return in_pieces(left, right_MN) if better else whole(left, right_MN)


def in_pieces(left: torch.Tensor, right_MN: torch.Tensor) -> torch.Tensor:
    """The product of the two, of at most PIECE_TOKENS tokens at a time."""
    left_TM = left.view(-1, left.shape[-1])
    tokens, out_TN = left_TM.shape[0], left.new_empty(*left.shape[:-1], right_MN.shape[1])
    rows_TN, step = out_TN.view(tokens, right_MN.shape[1]), -(-tokens // math.ceil(tokens / PIECE_TOKENS))
    for first in range(0, tokens, step):
        torch.mm(left_TM[first : first + step], right_MN, out=rows_TN[first : first + step])
    return out_TN


def _tried(key: tuple[int, ...], left: torch.Tensor, right_MN: torch.Tensor, whole: Product) -> bool:
    """Whether pieces are better: no, until this shape has come often enough for a trial. On numbers of its own: a gradient of zeros
    would show nothing."""
    _calls[key] = _calls.get(key, 0) + 1
    if _calls[key] < TRIED_AT:
        return False
    dense = torch.randn(left.shape, generator=torch.Generator().manual_seed(0), dtype=left.dtype)
    ways = {"whole": lambda: whole(dense, right_MN), "pieces": lambda: in_pieces(dense, right_MN)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, torch.Tensor] = {}
    for number in range(ROUNDS):
        for name in ways if number % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            found[name] = ways[name]()
            seconds[name].append(time.perf_counter() - started)
    alike = torch.equal(found["whole"], found["pieces"])
    _better[key] = alike and min(seconds["pieces"]) < FASTER * min(seconds["whole"])
    return _better[key]
