"""How the changes of several adapters to one tensor become one change: a table of functions.

Each function sees only the union of the kept entries, never the dense tensor, and so a density is always over an adapter's
own kept entries: 0.2 keeps a fifth of what that adapter changes. An entry an adapter does not have counts as zero.

Shape suffixes: A adapters, U union of the kept entries of all adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .random_mask import bernoulli_indices


@dataclass(frozen=True)
class Stack:
    """One tensor of all adapters, on the union of their entries."""

    name: str
    values_AU: torch.Tensor  # zero where an adapter has no entry
    present_AU: torch.Tensor  # whether it has one
    weights_A: torch.Tensor


Merged = tuple[torch.Tensor, torch.Tensor]  # values_U and whether an entry is kept


def _weighted_sum(stack: Stack, values_AU: torch.Tensor) -> torch.Tensor:
    return (values_AU * stack.weights_A[:, None]).sum(dim=0)


def _largest(stack: Stack, density: float) -> torch.Tensor:
    """present_AU cut to the `density` share of each adapter's entries that is largest in magnitude, the first of equals."""
    kept_AU = torch.zeros_like(stack.present_AU)
    for a, present_U in enumerate(stack.present_AU):
        where_K = torch.nonzero(present_U).flatten()
        count = int(density * where_K.numel())
        order_K = torch.sort(stack.values_AU[a, where_K].abs(), descending=True, stable=True).indices
        kept_AU[a, where_K[order_K[:count]]] = True
    return kept_AU


def _drawn(stack: Stack, density: float, seed: int) -> torch.Tensor:
    """present_AU cut to a random share: each entry with probability `density`, keyed by seed, tensor and the adapter's own
    entries, so that neither the order of the adapters nor the machine matters."""
    kept_AU = torch.zeros_like(stack.present_AU)
    seen: dict[str, int] = {}
    for a, present_U in enumerate(stack.present_AU):
        where_K = torch.nonzero(present_U).flatten()
        content = stack.values_AU[a, where_K].float().numpy().tobytes() + where_K.int().numpy().tobytes()
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
        seen[key] = seen.get(key, 0) + 1  # the same adapter twice is drawn twice
        drawn = bernoulli_indices(seed, f"{stack.name}\0{key}\0{seen[key]}", where_K.numel(), density)
        kept_AU[a, where_K[drawn.long()]] = True
    return kept_AU


def _elect(stack: Stack, values_AU: torch.Tensor) -> torch.Tensor:
    """TIES, steps 2 and 3: per entry the sign with the larger total, then the mean over those adapters that agree with it."""
    sign_U = torch.where(values_AU.sum(dim=0) >= 0, 1.0, -1.0)
    agrees_AU = values_AU.sign() == sign_U
    return _weighted_sum(stack, values_AU * agrees_AU) / agrees_AU.sum(dim=0).clamp(min=1)


def weighted_sum(stack: Stack, density: float, seed: int) -> Merged:
    """Σ w·Δ: SpaRTA's merging (weights 1), task arithmetic otherwise."""
    return _weighted_sum(stack, stack.values_AU), stack.present_AU.any(dim=0)


def mean(stack: Stack, density: float, seed: int) -> Merged:
    """Σ w·Δ / Σ w, over all adapters: one that does not change an entry pulls it towards the base."""
    return _weighted_sum(stack, stack.values_AU) / stack.weights_A.sum(), stack.present_AU.any(dim=0)


def negate(stack: Stack, density: float, seed: int) -> Merged:
    """-Σ w·Δ: take a task away instead of adding it."""
    return -_weighted_sum(stack, stack.values_AU), stack.present_AU.any(dim=0)


def magnitude(stack: Stack, density: float, seed: int) -> Merged:
    """Σ w·prune(Δ), keeping the largest entries of each adapter."""
    kept_AU = _largest(stack, density)
    return _weighted_sum(stack, stack.values_AU * kept_AU), kept_AU.any(dim=0)


def ties(stack: Stack, density: float, seed: int) -> Merged:
    """Trim to the largest entries, elect a sign, average those that agree."""
    kept_AU = _largest(stack, density)
    return _elect(stack, stack.values_AU * kept_AU), kept_AU.any(dim=0)


def dare(stack: Stack, density: float, seed: int) -> Merged:
    """Σ w·Δ / density over randomly kept entries: unbiased."""
    kept_AU = _drawn(stack, density, seed)
    return _weighted_sum(stack, stack.values_AU * kept_AU / density), kept_AU.any(dim=0)


def dare_ties(stack: Stack, density: float, seed: int) -> Merged:
    """Random dropping and rescaling, then TIES' sign election."""
    kept_AU = _drawn(stack, density, seed)
    return _elect(stack, stack.values_AU * kept_AU / density), kept_AU.any(dim=0)


@dataclass(frozen=True)
class Method:
    """A row of the table: what computes it, whether it takes a density or weights, and where it is described."""

    function: Callable[[Stack, float, int], Merged]
    density: bool
    weights: bool
    source: str


METHODS: dict[str, Method] = {
    "sum": Method(weighted_sum, density=False, weights=False, source="SpaRTA, arXiv 2502.15975"),
    "mean": Method(mean, density=False, weights=True, source=""),
    "weighted": Method(weighted_sum, density=False, weights=True, source="task arithmetic, arXiv 2212.04089"),
    "ties": Method(ties, density=True, weights=True, source="TIES, arXiv 2306.01708"),
    "dare": Method(dare, density=True, weights=True, source="DARE, arXiv 2311.03099"),
    "dare_ties": Method(dare_ties, density=True, weights=True, source="DARE with TIES, arXiv 2311.03099"),
    "magnitude": Method(magnitude, density=True, weights=True, source="magnitude pruning"),
    "negate": Method(negate, density=False, weights=True, source="task negation, arXiv 2212.04089"),
}
