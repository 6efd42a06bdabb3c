"""The change of one tensor: where (flat indices) and by how much (values). What every part of speft exchanges.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import UserError
from .gaps import index_dtype

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_indices(name: str, indices_K: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless `indices_K` is 1-D, integer, strictly increasing and within the tensor of `shape`."""
    numel = math.prod(shape)
    if indices_K.dim() != 1 or indices_K.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{name}: indices must be 1-D int32 or int64, got {indices_K.dtype} of shape {tuple(indices_K.shape)}")
    if indices_K.numel() == 0:
        return
    ordered = bool((indices_K[1:] > indices_K[:-1]).all())
    low, high = (indices_K[0], indices_K[-1]) if ordered else (indices_K.min(), indices_K.max())
    if int(low) < 0 or int(high) >= numel:
        raise UserError(f"{name}: indices must lie in [0, {numel}) for shape {shape}, got {int(low)} to {int(high)}")
    if not ordered:
        raise UserError(f"{name}: indices must be sorted without duplicates, they are not")


#: dtype -> an integer of its size, and the bits of its infinity, above which lies NaN
_INFINITY = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


def all_finite(values: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite; by their bits, which costs a tenth of `torch.isfinite` in 16 bits on a CPU."""
    if values.dtype not in _INFINITY or not values.numel():
        return bool(torch.isfinite(values).all())
    bits, infinity = _INFINITY[values.dtype]
    return int((values.detach().contiguous().view(bits) & torch.iinfo(bits).max).max()) < infinity


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; None where that is not counted (inference mode)."""
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """`values_K` added at the flat `indices_K` (sorted, unique; int32, or int64 past 2**31) of a tensor of `shape`."""

    indices_K: torch.Tensor
    values_K: torch.Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def nnz(self) -> int:
        """How many entries are kept."""
        return self.indices_K.numel()

    @property
    def numel(self) -> int:
        """How many entries the whole tensor has."""
        return math.prod(self.shape)

    def _versions(self) -> tuple[int | None, int | None]:
        return _version(self.indices_K), _version(self.values_K)

    def check(self, name: str = "delta") -> SparseDelta:
        """Return self, or raise UserError (naming `name`) for wrong ranges, order, duplicates, counts or non-finite values.

        What passed is not looked at again until a tensor is changed in place.
        """
        versions = self._versions()
        if None not in versions and self.__dict__.get("_passed") == versions:
            return self
        check_indices(name, self.indices_K, self.shape)
        return self.check_values(name)

    def check_values(self, name: str = "delta") -> SparseDelta:
        """As `check`, for the values alone: where the indices come from `gaps.decode` or a draw, which check their own."""
        if self.values_K.dtype not in VALUE_DTYPES or self.values_K.shape != self.indices_K.shape:
            got = f"{self.values_K.dtype} of shape {tuple(self.values_K.shape)}"
            raise UserError(f"{name}: values must be floating point, one per index ({self.nnz}), got {got}")
        if not all_finite(self.values_K):
            raise UserError(f"{name}: values must be finite, got NaN or infinity")
        object.__setattr__(self, "_passed", self._versions())
        return self

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SparseDelta:
        """The same delta with values in `dtype` and everything on `device`."""
        values_K = self.values_K.to(device=device, dtype=dtype)
        return SparseDelta(self.indices_K.to(device=device), values_K, self.shape)

    def to_dense(self) -> torch.Tensor:
        """A dense tensor of `shape` in the values' dtype, zero where nothing is kept."""
        dense = torch.zeros(self.numel, dtype=self.values_K.dtype, device=self.values_K.device)
        dense[self.indices_K.long()] = self.values_K
        return dense.view(self.shape)

    @classmethod
    def from_dense(cls, dense: torch.Tensor) -> SparseDelta:
        """The non-zero entries of `dense`, exactly."""
        indices_K = torch.nonzero(dense.reshape(-1)).flatten()
        return cls(indices_K.to(index_dtype(dense.numel())), dense.reshape(-1)[indices_K], tuple(dense.shape))
