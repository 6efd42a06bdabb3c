"""Random positions that depend on (seed, tensor name) alone: the same on every device, world size, order and reload.

The raw stream of the Philox counter generator is used, which NumPy guarantees not to change between versions; its
distributions carry no such promise. A mask drawn here need not store its indices: the adapter stores seed and count.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .gaps import index_dtype

_CHUNK = 1 << 22  # entries tossed at a time by the Bernoulli draw, 16 MB of 32-bit numbers


def _stream(seed: int, name: str) -> np.random.Philox:
    key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(key, dtype="<u8"))


def _distinct(stream: np.random.Philox, numel: int, k: int) -> np.ndarray:
    """`k` distinct integers of [0, numel), sorted, every set equally likely; memory O(k). Wants k <= numel / 2."""
    found = np.empty(0, dtype=np.uint64)
    while found.size < k:
        missing = k - found.size
        drawn = stream.random_raw(missing + missing // 8 + 16) % np.uint64(numel)
        fresh, first = np.unique(drawn, return_index=True)
        fresh = fresh[np.argsort(first, kind="stable")]  # in the order drawn, so that a cut keeps a fair sample
        fresh = fresh[~np.isin(fresh, found)][:missing]
        found = np.concatenate([found, fresh])
    return np.sort(found)


def random_indices(seed: int, name: str, numel: int, k: int) -> torch.Tensor:
    """Exactly `k` of the flat indices of a tensor of `numel` elements, sorted (int32, or int64 past 2**31 - 1)."""
    assert 0 <= k <= numel
    stream = _stream(seed, name)
    if 2 * k <= numel:
        chosen = _distinct(stream, numel, k)
    else:  # draw what is left out instead
        kept = np.ones(numel, dtype=bool)
        kept[_distinct(stream, numel, numel - k)] = False
        chosen = np.flatnonzero(kept)
    return torch.from_numpy(chosen.astype(np.int64)).to(index_dtype(numel))


def bernoulli_indices(seed: int, name: str, numel: int, density: float) -> torch.Tensor:
    """Each flat index kept with probability `density`, on its own (SpaRTA, section 3); resolution 2**-32."""
    threshold = round(density * 2**32)
    stream = _stream(seed, name)
    chosen = []
    for start in range(0, numel, _CHUNK):
        size = min(_CHUNK, numel - start)
        tosses = stream.random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]
        chosen.append(np.flatnonzero(tosses < threshold).astype(np.int64) + start)
    indices = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    return torch.from_numpy(indices).to(index_dtype(numel))


def split_evenly(k: int, numels: dict[str, int]) -> dict[str, int]:
    """Share `k` over tensors in proportion to their sizes, exactly: largest remainders first, ties by name."""
    total = sum(numels.values())
    floors = {n: k * size // total for n, size in numels.items()}
    by_remainder = sorted(numels, key=lambda n: (-(k * numels[n] % total), n))
    for name in by_remainder[: k - sum(floors.values())]:
        floors[name] += 1
    return floors
