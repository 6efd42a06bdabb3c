"""The k largest of scores that come tensor by tensor: exact, in bounded memory, at any size.

Scores become integers that sort as the floats do; a histogram of their high 16 bits, then one of the low 16 bits within
the bucket that holds the k-th, give the exact threshold; a last pass collects. While the first histogram grows, the bucket
that holds the k-th largest so far is a lower bound, and what lies below it is skipped. Equal scores are taken in tensor order,
then by index, so that exactly k are kept. Nothing larger than a chunk and the result is held.

Shape suffixes: N elements of a chunk, K kept entries, B buckets of a histogram, from the largest scores down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .gaps import index_dtype
from .random_mask import split_evenly

CHUNK = 1 << 20  # elements looked at together: 4 MB of fp32, near a core's cache
SCOPES = ("global", "local")
BUCKETS = 1 << 16


@dataclass(frozen=True)
class LazyScores:
    """Scores of one tensor that are made when looked at: `at(start, stop)` gives those flat indices, 1-D."""

    numel: int
    at: Callable[[int, int], torch.Tensor]


OneTensor = torch.Tensor | LazyScores
Scores = Mapping[str, OneTensor] | Callable[[], Iterable[tuple[str, OneTensor]]]


def _tensors(scores: Scores) -> Iterable[tuple[str, OneTensor]]:
    return scores.items() if isinstance(scores, Mapping) else scores()


def _chunks(scores: Scores) -> Iterator[tuple[str, int, torch.Tensor, float, float]]:
    """(name, flat index of the first element, fp32 scores, their minimum, their maximum) over all tensors in order.

    A function may hand out a tensor in several parts, one after the other under the same name. UserError for NaN and infinity.
    """
    seen: dict[str, int] = {}
    for name, tensor in _tensors(scores):
        if isinstance(tensor, torch.Tensor):
            tensor = LazyScores(tensor.numel(), _slices(tensor.detach().reshape(-1)))
        numel, at = tensor.numel, tensor.at
        offset = seen.get(name, 0)
        seen[name] = offset + numel
        for start in range(0, numel, CHUNK):
            scores_N = at(start, min(numel, start + CHUNK)).to(torch.float32)
            low, high = (float(x) for x in torch.aminmax(scores_N))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise UserError(
                    f"saliency scores must be finite, {name} has NaN or infinity; is the loss finite for every batch?"
                )
            yield name, offset + start, scores_N, low, high
        if not numel:
            yield name, offset, torch.empty(0), math.inf, -math.inf


def _slices(flat: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: flat[start:stop]


def _at_least(scores_N: torch.Tensor, bound: float) -> torch.Tensor:
    """Positions of the elements >= bound, ascending. NumPy does this several times faster than torch on a CPU."""
    if scores_N.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(scores_N.numpy() >= np.float32(bound)))
    return torch.nonzero(scores_N >= bound).flatten()


def _keys(scores_N: torch.Tensor) -> np.ndarray:
    """int32 keys that sort as the fp32 scores; -0.0 equals 0.0."""
    bits_N = (scores_N + 0.0).view(torch.int32).cpu().numpy()
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _value(key: int) -> float:
    """The fp32 score of a key."""
    bits = np.array([key], dtype=np.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)[0])


def _edge(bucket: int) -> float:
    """The smallest score of a bucket (0 holds the largest scores); past the last one on either side, infinity."""
    if bucket < 0:
        return math.inf
    value = _value(((BUCKETS - 1 - bucket) << 16) - (1 << 31))
    if math.isfinite(value):
        return value
    return math.inf if bucket < BUCKETS // 2 else -math.inf


def _high(scores_N: torch.Tensor) -> np.ndarray:
    return np.bincount((BUCKETS // 2 - 1) - (_keys(scores_N) >> 16), minlength=BUCKETS)


def _low(scores_N: torch.Tensor) -> np.ndarray:
    return np.bincount((BUCKETS - 1) - (_keys(scores_N) & 0xFFFF), minlength=BUCKETS)


def _in_bucket(scores_N: torch.Tensor, bucket: int) -> torch.Tensor:
    above = scores_N[_at_least(scores_N, _edge(bucket))]
    return above[above < _edge(bucket - 1)]


def _kth(counts_B: np.ndarray, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many lie in the buckets before it."""
    total_B = np.cumsum(counts_B)
    bucket = int(np.searchsorted(total_B, k))
    return bucket, int(total_B[bucket] - counts_B[bucket])


def _key(bucket: int, low: int) -> int:
    return ((BUCKETS // 2 - 1 - bucket) << 16) | (BUCKETS - 1 - low)


def kth_largest(scores: Scores, k: int) -> tuple[float, int, dict[str, int]]:
    """The k-th largest score, how many entries equal to it belong to the k largest, and name -> number of scores.

    Two passes. UserError for NaN or infinite scores, naming the tensor, and when there are fewer than k.
    """
    high_B, bound, sizes = np.zeros(BUCKETS, dtype=np.int64), -math.inf, dict[str, int]()
    for name, start, scores_N, least, most in _chunks(scores):
        sizes[name] = start + scores_N.numel()
        if most < bound or not scores_N.numel():
            continue
        high_B += _high(scores_N if least >= bound else scores_N[_at_least(scores_N, bound)])
        total_B = np.cumsum(high_B)
        if total_B[-1] >= k:
            bound = _edge(int(np.searchsorted(total_B, k)))
    if not 1 <= k <= sum(sizes.values()):
        raise UserError(f"k must lie between 0 and the {sum(sizes.values()):,} scores, got {k:,}")
    bucket, above = _kth(high_B, k)
    low_B = np.zeros(BUCKETS, dtype=np.int64)
    for _, _, scores_N, _, most in _chunks(scores):
        if most >= _edge(bucket):
            low_B += _low(_in_bucket(scores_N, bucket))
    low, above_within = _kth(low_B, k - above)
    return _value(_key(bucket, low)), k - above - above_within, sizes


def select_topk(scores: Scores, k: int) -> dict[str, torch.Tensor]:
    """The flat indices of the `k` largest scores over all tensors: name -> sorted indices (may be empty), on the CPU.

    `scores` maps names to tensors (any shape, compared in fp32) or LazyScores, or is a function that starts a new pass over
    such pairs in the same order each time; it is called three times.
    UserError for NaN or infinite scores, naming the tensor, and when there are fewer than k.
    """
    if k == 0 and isinstance(scores, Mapping):
        return {n: torch.empty(0, dtype=index_dtype(_numel(t))) for n, t in scores.items()}
    value, ties, sizes = kth_largest(scores, k)
    found: dict[str, list[torch.Tensor]] = {n: [] for n in sizes}
    for name, start, scores_N, _, most in _chunks(scores):
        if most < value:
            continue
        position_K = _at_least(scores_N, value)
        is_tie_K = scores_N[position_K] == value
        if bool(is_tie_K.any()):
            is_tie_K = is_tie_K.long()
            kept_K = (is_tie_K == 0) | (torch.cumsum(is_tie_K, 0) <= ties)
            ties -= min(ties, int(is_tie_K.sum()))
            position_K = position_K[kept_K]
        found[name].append((position_K + start).to(index_dtype(sizes[name])).cpu())
    return {n: torch.cat(p) if p else torch.empty(0, dtype=index_dtype(sizes[n])) for n, p in found.items()}


def _numel(tensor: OneTensor) -> int:
    return tensor.numel() if isinstance(tensor, torch.Tensor) else tensor.numel


def select(
    scores: Mapping[str, OneTensor],
    k: int,
    scope: str = "global",
    floors: Mapping[str, int] | None = None,
    caps: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """As `select_topk`; with scope "local" each tensor keeps the same share (largest remainders make it exactly k).

    floors, caps: name -> at least, at most so many of that tensor (only for scope "global"); the best choice under them is
    taken: one threshold, and tensors that would fall below or rise above keep exactly their bound.
    """
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    sizes = {n: _numel(t) for n, t in scores.items()}
    if scope == "global" and not floors and not caps:
        return select_topk(scores, k)
    if scope == "local":
        if floors or caps:
            raise UserError("min_per_layer and max_per_layer need scope global: local gives every tensor the same share")
        shares = split_evenly(k, sizes)
    else:
        shares = _bounded_shares(scores, k, sizes, floors or {}, caps or {})
    return {n: select_topk({n: t}, shares[n])[n] for n, t in scores.items()}


def _bounded_shares(
    scores: Mapping[str, OneTensor], k: int, sizes: Mapping[str, int], floors: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, int]:
    """How many each tensor keeps: clamp(entries above one threshold, floor, cap), the threshold such that they add up to k."""
    least = {n: min(floors.get(n, 0), size) for n, size in sizes.items()}
    most = {n: max(least[n], min(caps.get(n, size), size)) for n, size in sizes.items()}
    if sum(least.values()) > k or sum(most.values()) < k:
        bounds = f"{sum(least.values()):,} and {sum(most.values()):,}"
        raise UserError(f"min_per_layer and max_per_layer allow between {bounds} entries in all, the budget is k = {k:,}")

    def clamped(name: str, count: Any) -> Any:
        return np.clip(count, least[name], most[name])

    total_B, per_tensor = np.zeros(BUCKETS, dtype=np.int64), {}
    for name, tensor in scores.items():
        counts_B = np.zeros(BUCKETS, dtype=np.int64)
        for _, _, scores_N, _, _ in _chunks({name: tensor}):
            counts_B += _high(scores_N)
        per_tensor[name] = np.cumsum(counts_B)
        total_B += clamped(name, per_tensor[name])
    bucket = int(np.searchsorted(total_B, k))
    above = {n: int(c_B[bucket - 1]) if bucket else 0 for n, c_B in per_tensor.items()}
    total_B[:] = 0
    for name, tensor in scores.items():
        counts_B = np.zeros(BUCKETS, dtype=np.int64)
        for _, _, scores_N, _, largest in _chunks({name: tensor}):
            if largest >= _edge(bucket):
                counts_B += _low(_in_bucket(scores_N, bucket))
        per_tensor[name] = above[name] + np.cumsum(counts_B)
        total_B += clamped(name, per_tensor[name])
    low = int(np.searchsorted(total_B, k))
    shares = {n: int(clamped(n, c_B[low - 1] if low else above[n])) for n, c_B in per_tensor.items()}
    left = k - sum(shares.values())
    for name, count_B in per_tensor.items():  # entries equal to the threshold, in tensor order
        more = min(left, int(clamped(name, count_B[low])) - shares[name])
        shares[name] += more
        left -= more
    assert left == 0
    return shares
