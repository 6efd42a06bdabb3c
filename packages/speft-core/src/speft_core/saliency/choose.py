"""From lazily made scores, group of targets after group, to the chosen entries: O(k) memory beside the scores.

The k best of all targets are among the k best of each group, so a group's scores can be let go once its best are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from ..gaps import index_dtype
from ..random_mask import split_evenly
from ..select import CHUNK, LazyScores, select, select_topk
from ..structured import Structure, Units

Bound = int | float | None


@dataclass
class _Best:
    """The best units of one tensor so far: sorted numbers, scores, entries in each, and the entries themselves [U, entries]."""

    units: torch.Tensor
    scores: torch.Tensor
    sizes: torch.Tensor
    entries: torch.Tensor

    def at(self, position: torch.Tensor) -> _Best:
        """Those at the sorted positions."""
        return _Best(self.units[position], self.scores[position], self.sizes[position], self.entries[position])


@dataclass
class Chooser:
    """Takes scores group by group and ends with exactly k entries (structured: as many whole units as k allows).

    sizes: name -> entries of all targets, in order. floors, caps: name -> bounds on what a tensor keeps.
    """

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    k: int
    scope: str
    floors: dict[str, int]
    caps: dict[str, int]
    structure: Structure | None = None
    _best: dict[str, _Best] = field(default_factory=dict)
    _final: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shares = split_evenly(self.k, self.sizes) if self.scope == "local" else {}
        if self.scope == "local" and (self.floors or self.caps):
            raise UserError("min_per_layer and max_per_layer need scope global: local gives every tensor the same share")
        if self.structure and (self.floors or self.caps):
            raise UserError("min_per_layer and max_per_layer count single entries; they need structure entries")
        most = sum(min(s, self.caps.get(n, s)) for n, s in self.sizes.items())
        least = sum(min(s, self.floors.get(n, 0)) for n, s in self.sizes.items())
        if not least <= self.k <= most:
            raise UserError(
                f"min_per_layer and max_per_layer allow between {least:,} and {most:,} entries in all, k = {self.k:,}"
            )

    def add(self, scores: Mapping[str, LazyScores]) -> None:
        """Keep what may be among the best of `scores`, whose tensors come in the order of `sizes`."""
        if self.structure is None:
            self._add_entries(scores)
        else:
            self._add_units(scores, self.structure)

    def _add_entries(self, scores: Mapping[str, LazyScores]) -> None:
        if self.scope == "local":
            for name, lazy in scores.items():
                self._final |= select({name: lazy}, self.shares[name])
            return
        found = self._select(scores)
        if scores.keys() == self.sizes.keys():
            self._final = found
            return
        for name, indices_K in found.items():
            values_K = gather_lazy(scores[name], indices_K)
            self._best[name] = _Best(indices_K, values_K, indices_K, indices_K)
        kept = self._select({n: b.scores for n, b in self._best.items()})
        self._best = {n: self._best[n].at(position_K) for n, position_K in kept.items()}

    def _select(self, scores: Mapping[str, LazyScores] | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The best of some of the tensors, as many as all of the budget would allow them."""
        numels = {n: t.numel() if isinstance(t, torch.Tensor) else t.numel for n, t in scores.items()}
        room = sum(min(s, max(self.caps.get(n, s), self.floors.get(n, 0))) for n, s in numels.items())
        return select(scores, min(self.k, room), "global", self.floors, self.caps)

    def _add_units(self, scores: Mapping[str, LazyScores], structure: Structure) -> None:
        tensors = {n: Units(n, structure, self.shapes[n], lazy) for n, lazy in scores.items()}
        if self.scope == "local":
            for name, units in tensors.items():
                self._best |= _prefix(_best_units({name: units}, self.shares[name]), self.shares[name], whole=True)
        else:
            self._best = _prefix(self._best | _best_units(tensors, self.k), self.k)

    def result(self) -> dict[str, torch.Tensor]:
        """name -> sorted flat indices, in the order of `sizes`."""
        if self.structure and self.scope == "global":
            self._best = _prefix(self._best, self.k, whole=True)
        for name, best in self._best.items():
            flat = best.entries.reshape(-1)
            self._final[name] = flat if self.structure is None else flat[flat >= 0].sort().values
        if self.k and not any(i.numel() for i in self._final.values()):
            raise UserError(f"the budget must hold at least one whole unit of the structure, k = {self.k:,} holds none")
        return {n: self._final[n].to(index_dtype(size)) for n, size in self.sizes.items()}


def _best_units(tensors: Mapping[str, Units], k: int) -> dict[str, _Best]:
    """Of each tensor the units that may be chosen: the best of all by score, as many as k entries could hold."""
    smallest = min(int(u.sizes(torch.arange(u.count)[-1:]).min()) for u in tensors.values())
    count = min(sum(u.count for u in tensors.values()), k // smallest + 1)  # one more: the one that ends the choice
    found = {}
    for name, units_U in select_topk({n: u.scores for n, u in tensors.items()}, count).items():
        units = tensors[name]
        scores_U = gather_lazy(units.scores, units_U)
        found[name] = _Best(units_U, scores_U, units.sizes(units_U.long()), units.entries_of(units_U))
    return found


def _prefix(best: Mapping[str, _Best], k: int, whole: bool = False) -> dict[str, _Best]:
    """By score (equal ones in order), as many units as k entries hold; the first that does not fit ends it.

    Without `whole` that first one is kept too: it must still end the choice when further groups have been looked at.
    """
    scores_U = torch.cat([b.scores for b in best.values()])
    sizes_U = torch.cat([b.sizes for b in best.values()])
    order_U = torch.sort(scores_U, descending=True, stable=True).indices
    chosen_U = torch.zeros(order_U.numel(), dtype=torch.bool)
    filled_U = torch.cumsum(sizes_U[order_U], 0)
    chosen_U[order_U[(filled_U if whole else filled_U - sizes_U[order_U]) <= k]] = True
    parts = chosen_U.split([b.units.numel() for b in best.values()])
    return {n: b.at(torch.nonzero(part_U).flatten()) for (n, b), part_U in zip(best.items(), parts, strict=True)}


def gather_lazy(scores: LazyScores, indices_K: torch.Tensor) -> torch.Tensor:
    """The fp32 scores at sorted `indices_K`, on the CPU, made a chunk at a time."""
    parts = [torch.empty(0)]
    for start in range(0, scores.numel, CHUNK):
        low, high = torch.searchsorted(indices_K, torch.tensor([start, start + CHUNK], dtype=indices_K.dtype)).tolist()
        if low < high:
            chunk = scores.at(start, min(scores.numel, start + CHUNK)).to(torch.float32)
            parts.append(chunk[(indices_K[low:high].long() - start).to(chunk.device)].cpu())
    return torch.cat(parts)
