"""Masks made of whole units: rows, columns, b x b blocks, or the N best of each M neighbours in a row (N:M).

A unit scores the sum of its entries' scores. Units are chosen by score until the next would pass the budget, so k is never
exceeded and less than one unit is missing. The mask is an ordinary SparsityMask.

Parameters are looked at as matrices [R, C], C the last dimension; those with one dimension have no structure. Shape
suffixes: R rows, C columns, U units, K kept entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import UserError
from .select import CHUNK, LazyScores

ALLOWED = "entries, rows, columns, blocks:B (such as blocks:16) or N:M (such as 2:4)"


@dataclass(frozen=True)
class Structure:
    """kind: rows, columns, blocks or nm. rows_of_band x width is a unit's extent; nm keeps `keep` of each `width`."""

    kind: str
    width: int = 0
    keep: int = 0

    @classmethod
    def parse(cls, text: str) -> Structure | None:
        """The structure that `text` names; None for "entries"."""
        if text == "entries":
            return None
        if text in ("rows", "columns"):
            return cls(text)
        blocks, n_of_m = re.fullmatch(r"blocks:(\d+)", text), re.fullmatch(r"(\d+):(\d+)", text)
        if blocks and int(blocks[1]) > 1:
            return cls("blocks", int(blocks[1]))
        if n_of_m and 0 < int(n_of_m[1]) < int(n_of_m[2]):
            return cls("nm", int(n_of_m[2]), int(n_of_m[1]))
        raise UserError(f"structure must be {ALLOWED}, got {text!r}")


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """[R, C]; UserError for a parameter of fewer than two dimensions."""
    if len(shape) < 2:
        raise UserError(f"rows, columns, blocks and N:M need matrices, {name} has shape {shape}; leave it out of the targets")
    return math.prod(shape[:-1]), shape[-1]


class Units:
    """The units of one tensor: how many, how large, their scores, and the entries of chosen ones."""

    def __init__(self, name: str, structure: Structure, shape: tuple[int, ...], entries: LazyScores) -> None:
        self.structure, self.entries = structure, entries
        self.rows, self.columns = matrix_shape(name, shape)
        kind, width = structure.kind, structure.width
        self.band = width if kind == "blocks" else 1  # rows that are looked at together
        self.per_band = -(-self.columns // width) if width else 1
        self.count = self.columns if kind == "columns" else -(-self.rows // self.band) * self.per_band
        self._column_sums: torch.Tensor | None = None

    def sizes(self, units_U: torch.Tensor) -> torch.Tensor:
        """Entries that each of `units_U` keeps."""
        kind, width = self.structure.kind, self.structure.width
        if kind in ("rows", "columns"):
            return torch.full_like(units_U, self.columns if kind == "rows" else self.rows)
        wide_U = (self.columns - units_U % self.per_band * width).clamp(max=width)
        if kind == "nm":
            return wide_U.clamp(max=self.structure.keep)
        return wide_U * (self.rows - units_U // self.per_band * width).clamp(max=width)

    @property
    def scores(self) -> LazyScores:
        """A score for each unit."""
        return LazyScores(self.count, self._at)

    def _bands(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first band, scores of some bands' entries [bands · band, C]), about a chunk at a time."""
        step = max(1, CHUNK // max(1, self.band * self.columns))
        for start in range(first, last, step):
            stop = min(last, start + step)
            top, bottom = start * self.band, min(self.rows, stop * self.band)
            yield start, self.entries.at(top * self.columns, bottom * self.columns).view(bottom - top, self.columns)

    def _at(self, start: int, stop: int) -> torch.Tensor:
        if self.structure.kind == "columns":
            if self._column_sums is None:
                self._column_sums = torch.stack([b.sum(0) for _, b in self._bands(0, self.rows)]).sum(0)
            return self._column_sums[start:stop]
        first, last = start // self.per_band, -(-stop // self.per_band)
        sums = torch.cat([self._band_scores(part).reshape(-1) for _, part in self._bands(first, last)])
        return sums[start - first * self.per_band : stop - first * self.per_band]

    def _band_scores(self, part_RC: torch.Tensor) -> torch.Tensor:
        kind, width = self.structure.kind, self.structure.width
        if kind == "rows":
            return part_RC.sum(1)
        missing = self.per_band * width - self.columns
        if kind == "nm":
            group_RUM = self._groups(part_RC)
            best_RUN = torch.topk(group_RUM, self.structure.keep, dim=2).values
            return torch.where(torch.isinf(best_RUN) & (best_RUN < 0), 0, best_RUN).sum(2) if missing else best_RUN.sum(2)
        padded = torch.nn.functional.pad(part_RC, (0, missing, 0, -part_RC.shape[0] % width))
        return padded.view(-1, width, self.per_band, width).sum((1, 3))

    def _groups(self, part_RC: torch.Tensor) -> torch.Tensor:
        """[R, U, M]; a short last group is filled up with what is never among the best."""
        missing = self.per_band * self.structure.width - self.columns
        padded = torch.nn.functional.pad(part_RC, (0, missing), value=-math.inf)
        return padded.view(part_RC.shape[0], self.per_band, self.structure.width)

    def entries_of(self, units_U: torch.Tensor) -> torch.Tensor:
        """Flat indices of the entries that the sorted `units_U` keep, [U, entries], -1 where a unit at the edge has fewer."""
        kind, width = self.structure.kind, self.structure.width
        units_U = units_U.long()
        if kind == "rows":
            return units_U[:, None] * self.columns + torch.arange(self.columns)
        if kind == "columns":
            return units_U[:, None] + torch.arange(self.rows) * self.columns
        if kind == "nm":
            return self._best_of_groups(units_U)
        row_UB = units_U[:, None] // self.per_band * width + torch.arange(width)
        column_UB = units_U[:, None] % self.per_band * width + torch.arange(width)
        flat = row_UB[:, :, None] * self.columns + column_UB[:, None, :]
        inside = (row_UB < self.rows)[:, :, None] & (column_UB < self.columns)[:, None, :]
        return torch.where(inside, flat, -1).flatten(1)

    def _best_of_groups(self, units_U: torch.Tensor) -> torch.Tensor:
        keep, width = self.structure.keep, self.structure.width
        found = [torch.empty(0, keep, dtype=torch.int64)]
        for start, part_RC in self._bands(0, self.rows):
            bounds = torch.tensor([start, start + part_RC.shape[0]]) * self.per_band
            low, high = torch.searchsorted(units_U, bounds).tolist()
            chosen_U = units_U[low:high]
            of_part_U = (chosen_U - start * self.per_band).to(part_RC.device)
            group_UM = self._groups(part_RC).reshape(-1, width)[of_part_U]
            # A stable sort, so that equal scores keep the earlier entry.
            best_UN = torch.sort(group_UM, dim=1, descending=True, stable=True).indices[:, :keep].cpu()
            column_UN = (chosen_U % self.per_band * width)[:, None] + best_UN
            flat_UN = (chosen_U // self.per_band * self.columns)[:, None] + column_UN
            found.append(torch.where(column_UN < self.columns, flat_UN, -1))
        return torch.cat(found)
