"""The k largest of scores that come tensor by tensor: exact, in bounded memory, at any size.

Scores become integers that sort as the floats do; a histogram of their high 16 bits, then one of the low 16 bits within
the bucket that holds the k-th, give the exact threshold; a last pass collects. Equal scores are taken in tensor order,
then by index, so that exactly k are kept. Nothing larger than a chunk and the result is held.

Shape suffixes: N elements of a chunk, K kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from .errors import UserError
from .gaps import index_dtype
from .random_mask import split_evenly

CHUNK = 1 << 20  # elements looked at together: 4 MB of fp32, near a core's cache
SCOPES = ("global", "local")

Scores = Mapping[str, torch.Tensor] | Callable[[], Iterable[tuple[str, torch.Tensor]]]


def _keys(name: str, scores_N: torch.Tensor) -> torch.Tensor:
    """int32 keys that sort as the fp32 scores; -0.0 equals 0.0. UserError for NaN and infinity."""
    scores_N = scores_N.to(torch.float32)
    if not bool(torch.isfinite(scores_N).all()):
        raise UserError(
            f"saliency scores must be finite, {name} has NaN or infinity; is the loss finite for every batch?"
        )
    bits_N = (scores_N + 0.0).view(torch.int32)
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _chunks(scores: Scores) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, flat index of the first element, keys) over all tensors in order."""
    for name, tensor in scores.items() if isinstance(scores, Mapping) else scores():
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            yield name, start, _keys(name, flat[start : start + CHUNK])


def _bucket_of_kth(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many lie in the buckets above it."""
    from_top = torch.cumsum(histogram.flip(0), 0)
    position = int(torch.searchsorted(from_top, k))
    return histogram.numel() - 1 - position, int(from_top[position] - histogram[-1 - position])


def threshold(scores: Scores, k: int) -> tuple[int, int]:
    """(key of the k-th largest score, how many entries equal to it belong to the k largest)."""
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for _, _, keys_N in _chunks(scores):
        high += torch.bincount((keys_N >> 16) + (1 << 15), minlength=1 << 16).cpu()
    bucket, above = _bucket_of_kth(high, k)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for _, _, keys_N in _chunks(scores):
        within = keys_N[(keys_N >> 16) == bucket - (1 << 15)] & 0xFFFF
        low += torch.bincount(within, minlength=1 << 16).cpu()
    last, above_within = _bucket_of_kth(low, k - above)
    return ((bucket - (1 << 15)) << 16) | last, k - above - above_within


def select_topk(scores: Scores, k: int) -> dict[str, torch.Tensor]:
    """The flat indices of the `k` largest scores over all tensors: name -> sorted indices (may be empty), on the CPU.

    `scores` maps names to tensors (any shape, compared in fp32), or is a function that starts a new pass over
    (name, tensor) pairs in the same order each time; it is called three times.
    UserError for NaN or infinite scores, naming the tensor, and when there are fewer than k.
    """
    sizes = {n: t.numel() for n, t in (scores.items() if isinstance(scores, Mapping) else scores())}
    if not 0 <= k <= sum(sizes.values()):
        raise UserError(f"k must lie between 0 and the {sum(sizes.values()):,} scores, got {k:,}")
    found: dict[str, list[torch.Tensor]] = {n: [] for n in sizes}
    if k:
        key, ties = threshold(scores, k)
        for name, start, keys_N in _chunks(scores):
            kept = keys_N > key
            if ties:
                equal = torch.nonzero(keys_N == key).flatten()[:ties]
                kept[equal] = True
                ties -= equal.numel()
            found[name].append(torch.nonzero(kept).flatten().cpu() + start)
    return {n: _join(parts, sizes[n]) for n, parts in found.items()}


def _join(parts: list[torch.Tensor], numel: int) -> torch.Tensor:
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)).to(index_dtype(numel))


def select(scores: Mapping[str, torch.Tensor], k: int, scope: str = "global") -> dict[str, torch.Tensor]:
    """As `select_topk`; with scope "local" each tensor keeps the same share (largest remainders make it exactly k)."""
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "global":
        return select_topk(scores, k)
    shares = split_evenly(k, {n: math.prod(t.shape) for n, t in scores.items()})
    return {n: select_topk({n: t}, shares[n])[n] for n, t in scores.items()}
