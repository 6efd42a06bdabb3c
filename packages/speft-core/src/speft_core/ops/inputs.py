"""What backward knows of a layer's input: columns kept in forward, or factors that autograd keeps anyway.

Shape suffixes: I inputs, T tokens, C columns with an entry, U columns kept (those of all layers that share the input).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from . import triton_turn
from .layout import Layout
from .recipes import Recipe, as_rows


@dataclass(slots=True, eq=False)  # frozen costs microseconds, and one is made for every layer and step
class Inputs:
    """The input [T, I] as a product of factors, each with the dtype that the product so far is rounded to.

    given: the factors [T, I], or as the recipe gave them. columns_U: which columns of the input they hold (sorted), or None for
    all of them. key: names `columns_U`, so that what is derived from it can be remembered. recipe: where they come from.
    """

    given: list[tuple[torch.Tensor, torch.dtype]]
    columns_U: torch.Tensor | None = None
    key: Hashable = None
    recipe: Recipe | None = None
    _rows: list[tuple[torch.Tensor, torch.dtype]] | None = None

    @property
    def factors(self) -> list[tuple[torch.Tensor, torch.dtype]]:
        """The factors, each [T, I]."""
        if self._rows is None:
            self._rows = self.given
            if self.recipe is not None:
                self._rows = [(as_rows(factor, self.recipe.shape), dtype) for factor, dtype in self.given]
        return self._rows

    def places(self, layout: Layout) -> torch.Tensor:
        """Where the layout's columns lie among the factors' columns."""
        if self.columns_U is None:
            return layout.cols_C
        if self.columns_U is layout.cols_C:
            return torch.arange(layout.cols_C.numel(), device=layout.cols_C.device, dtype=layout.cols_C.dtype)
        return torch.searchsorted(self.columns_U, layout.cols_C, out_int32=layout.cols_C.dtype == torch.int32)

    def picks(self, layout: Layout) -> torch.Tensor | None:
        """Which of the factors' columns are the layout's; None: all of them, in order."""
        if self.columns_U is layout.cols_C or layout.cols_C.numel() == self.factors[0][0].shape[1]:
            return None
        places: torch.Tensor = layout.derived(("places", self.key), lambda: self.places(layout))
        return places

    def gather(self, picks_C: torch.Tensor | None) -> torch.Tensor:
        """The input as the layer read it, [T, C]: those of the factors' columns, or all (None)."""
        (first, dtype), *others = self.factors
        if others and first.device.type == "cuda" and triton_turn.usable(*(factor for factor, _ in self.factors)):
            return triton_turn.turned(self.factors, picks_C).T[: first.shape[0]]
        x_TC = (first if picks_C is None else first.index_select(1, picks_C)).to(dtype)
        for factor, dtype in others:
            x_TC = (x_TC * (factor if picks_C is None else factor.index_select(1, picks_C))).to(dtype)
        return x_TC
