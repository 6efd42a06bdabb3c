"""Which columns of an input forward keeps, and keeping them once for all layers that read the same input.

The layers that share an input find each other in the first forward: each leaves its name on the input tensor. From then on the
first of them keeps the columns that any of them needs, and leaves those on the tensor for the others. A tensor that was
changed in place since is not trusted. Nothing is held beyond the tensors themselves.

Shape suffixes: I inputs, T tokens, C columns with an entry of one layer, U columns kept (of all layers that share it).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .layout import Layout
from .recipes import hooks_forbid

_READERS, _KEPT = "_speft_readers", "_speft_kept"
WHOLE_ABOVE = 0.9  # share of columns from which on the input itself is kept, which costs no copy


class Keeper:
    """A layer's part in sharing: its columns, and once known the layers that read the same input.

    dtype: what kept columns are stored in (None: as they are).
    """

    def __init__(self, cols_C: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.cols_C, self.dtype = cols_C, dtype
        self.readers: list[Keeper] | None = None
        self._union: tuple[int, torch.Tensor] | None = None

    def meet(self, x: torch.Tensor) -> None:
        """In the first forward: join the layers that have read `x`."""
        if self.readers is None:
            self.readers = x.__dict__.setdefault(_READERS, [])
            self.readers.append(self)

    def columns(self) -> tuple[torch.Tensor, Hashable]:
        """The columns to keep, sorted, and a name for them."""
        readers = self.readers or [self]
        if len(readers) == 1:
            return self.cols_C, "own"
        if self._union is None or self._union[0] != len(readers) or self._union[1].device != self.cols_C.device:
            first = readers[0]
            if first is self:
                union_U = torch.cat([r.cols_C.to(self.cols_C.device) for r in readers]).unique()
            else:
                union_U = first.columns()[0]
            self._union = (len(readers), union_U)
        return self._union[1], ("union", len(readers))


def kept_columns(
    given: torch.Tensor, x: torch.Tensor, layout: Layout, keeper: Keeper | None
) -> tuple[torch.Tensor, torch.Tensor | None, Hashable]:
    """What to save of x (`given` after autocast): the tensor [T, U], its columns (None: all), and a name for them."""
    columns_U: torch.Tensor = layout.cols_C
    key: Hashable = "own"
    if keeper is not None:
        keeper.cols_C = layout.cols_C
        if not hooks_forbid():  # activation checkpointing checks that its second forward keeps what the first one did
            columns_U, key = keeper.columns()
            keeper.meet(given)
    x_TI = x.reshape(-1, x.shape[-1])
    dtype = (keeper.dtype if keeper is not None else None) or x.dtype
    if columns_U.numel() >= WHOLE_ABOVE * layout.shape[1] and dtype == x.dtype:
        return x_TI, None, None
    shared = given.__dict__.get(_KEPT)
    if shared is not None and shared[0] == (given._version, dtype) and shared[1] is columns_U:
        return shared[2], columns_U, key
    kept_TU = x_TI.index_select(1, columns_U).to(dtype)
    if key != "own":
        given.__dict__[_KEPT] = ((given._version, dtype), columns_U, kept_TU)
    return kept_TU, columns_U, key
