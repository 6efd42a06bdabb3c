"""The adapter: what was learned, put onto a model in place and taken off bit for bit; its files are in adapter_files.py.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_files import AdapterConfig, read_folder, write_folder
from .delta import SparseDelta, all_finite
from .errors import UserError
from .fingerprint import check_fingerprint, check_shape, covers_entries, same_bits
from .partitioned import is_partitioned, own_part, whole
from .targets import base_parameters
from .threads import each
from .writing import Entries, ShardedEntries

SMALL = 1 << 21  # entries below which threads cost more than they save


@dataclass(frozen=True, eq=False)
class SparseAdapter:
    """All that was learned.

    deltas: parameter name -> SparseDelta. dense: parameter name -> the whole tensor (heads), which replaces the model's.
    config: AdapterConfig. fingerprint: parameter name -> shape and hashes of the base (see fingerprint.py).
    """

    deltas: dict[str, SparseDelta]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    config: AdapterConfig = field(default_factory=AdapterConfig)
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def nnz(self) -> int:
        """How many sparse entries are kept in all."""
        return sum(d.nnz for d in self.deltas.values())

    def check(self) -> SparseAdapter:
        """Return self, or raise UserError naming the first tensor that is out of range, unsorted or not finite."""
        each(lambda name: self.deltas[name].check(name), self.deltas, small=self.nnz < SMALL)
        return self._check_dense()

    def _check_dense(self) -> SparseAdapter:
        for name, tensor in self.dense.items():
            if not tensor.is_floating_point() or not all_finite(tensor):
                raise UserError(f"dense.{name}: must be finite floating point, got {tensor.dtype} or NaN or infinity")
            if name in self.deltas:
                raise UserError(f"{name} is both sparse and dense in one adapter")
        return self

    def check_base(self, model: nn.Module) -> None:
        """Raise UserError naming the first tensor in which `model` is not the base of this adapter.

        Names, shapes and a hash of the base's entries are compared; see fingerprint.py for models in another dtype.
        """
        self._entries(self._matching(model), check_base=True)

    def _matching(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters; UserError for the first that is missing or has another shape."""
        parameters = base_parameters(model)
        for name in (*self.deltas, *self.dense):
            if name not in parameters:
                raise UserError(f"this adapter is for another base ({self._base}): the model has no parameter {name!r}")
        for name, delta in self.deltas.items():
            check_shape(name, parameters[name], delta.shape, self._base)
        for name, tensor in self.dense.items():
            check_shape(name, parameters[name], tuple(tensor.shape), self._base)
        return parameters

    def _entries(self, parameters: Mapping[str, nn.Parameter], check_base: bool) -> Entries | ShardedEntries:
        """The entries of the base, in the order of the deltas, compared with the fingerprint."""
        places = []
        for name, delta in self.deltas.items():
            weight = parameters[name]
            here = delta if delta.indices_K.device == weight.device == delta.values_K.device else delta.to(device=weight.device)
            places.append((weight, here.indices_K, here.values_K))

        def compare(found: tuple[str, torch.Tensor]) -> None:
            name, base_K = found
            check_fingerprint(name, parameters[name], self.deltas[name], self.fingerprint.get(name), self._base, base_K)

        if any(is_partitioned(weight) for weight, *_ in places):
            names = iter(self.deltas)
            return ShardedEntries(places, lambda base_K: compare((next(names), base_K)) if check_base else None)
        entries = Entries(places)
        if check_base and not self._is_verified(entries):
            each(compare, zip(self.deltas, entries.base, strict=True), small=self.nnz < SMALL)
            if all(covers_entries(self.fingerprint.get(n), parameters[n].dtype) for n in self.deltas):
                self.__dict__["_verified"] = copy.deepcopy(self.fingerprint), entries.flat
        return entries

    def _is_verified(self, entries: Entries) -> bool:
        """Whether these very bits of the base have passed the check before: comparing them costs a tenth of hashing them."""
        fingerprint, flat = self.__dict__.get("_verified", (None, ()))
        if fingerprint != self.fingerprint or len(flat) != len(entries.flat):
            return False
        return all(same_bits(known, found) for known, found in zip(flat, entries.flat, strict=True))

    @property
    def _base(self) -> str:
        return self.config.base_model_name_or_path or "an unnamed model"

    def apply(self, model: nn.Module, check_base: bool = True) -> Applied:
        """Write the adapter into `model` in place and return the handle whose `.restore()` takes it off, bit for bit.

        Everything is checked before the first weight is touched. UserError for another base, or while a tuner is attached.
        """
        if getattr(model, "_speft_tuner", None) is not None:
            raise UserError("an adapter cannot be applied while a tuner is attached; call tuner.detach() first")
        self.check()
        parameters = self._matching(model)
        return Applied(self, model, parameters, self._entries(parameters, check_base))

    @contextmanager
    def applied(self, model: nn.Module, check_base: bool = True) -> Iterator[nn.Module]:
        """`with adapter.applied(model): ...` — in place, no copy; restored bit for bit on exit."""
        handle = self.apply(model, check_base)
        try:
            yield model
        finally:
            handle.restore()

    def save(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder` (made when missing)."""
        self.check()
        write_folder(Path(folder), (self.deltas, self.dense, self.config, self.fingerprint))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> SparseAdapter:
        """Read and check the adapter in `folder`; UserError (one line) for anything missing, damaged or hostile."""
        try:
            return cls(*read_folder(Path(folder), str(device)))._check_dense()  # its deltas were checked as they were read
        except UserError as error:
            place = "" if str(folder) in str(error) else f"{folder}: "
            raise UserError(f"{place}{error}") from None


class Applied:
    """An adapter that sits in a model. Several may be stacked; they come off in the reverse order."""

    def __init__(
        self, adapter: SparseAdapter, model: nn.Module, parameters: Mapping[str, nn.Parameter], entries: Entries | ShardedEntries
    ) -> None:
        """Write. `parameters`: the model's, by name. `entries`: what the deltas of `adapter` change in them, in order."""
        self._model, self._names, self._entries = model, list(adapter.deltas), entries
        self._saved_dense = {n: own_part(parameters[n]).clone() for n in adapter.dense}
        entries.add()
        for name, tensor in adapter.dense.items():
            with whole([parameters[name]], change=True):
                parameters[name].data.copy_(tensor)
        self._stack: list[Applied] = model.__dict__.setdefault("_speft_applied", [])
        self._stack.append(self)

    def restore(self) -> None:
        """Put the base's bits back. A second call does nothing; UserError when a later adapter still sits on top."""
        if self not in self._stack:
            return
        if self._stack[-1] is not self:
            raise UserError("adapters come off in the reverse order: restore the one applied last first")
        parameters = base_parameters(self._model)
        self._entries.put_back([parameters[name] for name in self._names])
        for name, tensor in self._saved_dense.items():
            own_part(parameters[name]).copy_(tensor)
        self._stack.pop()
        del self._entries, self._saved_dense
