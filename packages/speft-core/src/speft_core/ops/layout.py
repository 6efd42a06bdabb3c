"""Where the kept entries of one [O, I] weight lie: computed once when attaching, in the forms that the plans read.

Shape suffixes: O outputs, I inputs, K kept entries, R rows with an entry, C columns with an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

_ON_DEVICE = ("rows_R", "cols_C", "row_of_K", "col_of_K")


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows and columns touched by a mask, and each entry's place among them. Index tensors are int32 for weights of less
    than 2**31 elements, else int64, all on one device."""

    shape: tuple[int, int]
    rows_R: torch.Tensor  #: sorted rows that hold an entry
    cols_C: torch.Tensor  #: sorted columns that hold an entry
    row_of_K: torch.Tensor  #: each entry's position in rows_R; never decreases, as entries are sorted row by row
    col_of_K: torch.Tensor  #: each entry's position in cols_C
    first_R: torch.Tensor  #: [R + 1] on the CPU, int64: entries of row r of rows_R are first_R[r]:first_R[r + 1]
    host_R: torch.Tensor  #: rows_R on the CPU, so that tiles are made without waiting for a device
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, indices_K: torch.Tensor, shape: tuple[int, int]) -> Layout:
        """The layout of sorted flat `indices_K` of a weight of `shape`."""
        wide_K = indices_K.long()
        rows_R, row_of_K, counts_R = torch.unique_consecutive(
            wide_K // max(1, shape[1]), return_inverse=True, return_counts=True
        )
        cols_C, col_of_K = torch.unique(wide_K % max(1, shape[1]), return_inverse=True)
        first_R = torch.zeros(rows_R.numel() + 1, dtype=torch.int64)
        first_R[1:] = torch.cumsum(counts_R.cpu(), 0)
        narrow = torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64
        rows_R, cols_C, row_of_K, col_of_K = (t.to(narrow) for t in (rows_R, cols_C, row_of_K, col_of_K))
        return cls(shape, rows_R, cols_C, row_of_K, col_of_K, first_R, rows_R.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}  # holds addresses, which a copy must not have

    @property
    def nnz(self) -> int:
        """Kept entries."""
        return self.row_of_K.numel()

    @property
    def touched_area(self) -> float:
        """Share of the weight that its touched rows and columns span."""
        return self.rows_R.numel() * self.cols_C.numel() / max(1, self.shape[0] * self.shape[1])

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once and remembered under `key`; lost when the layout moves to another device."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device; `first_R` and `host_R` stay on the CPU."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_derived"}
        for name in _ON_DEVICE:
            moved[name] = moved[name].to(device)
        return Layout(**moved)
