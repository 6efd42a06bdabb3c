"""Changing which entries an attached tuner trains, without losing a bit of what was learned.

A change of mask "folds" what was trained: entries that leave the mask stay as they are in the weight, parked with their
change since the base. Every entry remains base + change in fp32, whether it trains or rests, so the adapter of the union
gives the final weights bit for bit; an entry that comes back goes on from its change.

Shape suffixes: K active entries, P parked entries, U both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from .delta import SparseDelta
from .errors import UserError
from .fingerprint import fingerprint
from .gaps import index_dtype
from .mask import SparsityMask
from .partitioned import is_partitioned, own_part
from .writing import add_values, gather, scatter

if TYPE_CHECKING:
    from .attach import Tuner


@dataclass(frozen=True)
class Parked:
    """Entries of one parameter that were trained and now rest: sorted indices, change since the base, the base's bits."""

    indices_P: torch.Tensor
    values_P: torch.Tensor
    base_P: torch.Tensor

    def to(self, device: torch.device) -> Parked:
        """The same on `device`: they are no part of the model, which may have moved since."""
        if self.values_P.device == device:
            return self
        return Parked(self.indices_P.to(device), self.values_P.to(device), self.base_P.to(device))

    def loaded_from(self, weight: torch.Tensor) -> Parked:
        """The same entries with the change that a newly loaded weight holds."""
        here = self.to(weight.device)
        wide_P = gather(weight, here.indices_P).to(here.values_P.dtype)
        return Parked(here.indices_P, wide_P - here.base_P.to(wide_P.dtype), here.base_P)


def active(tuner: Tuner, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(sorted indices, values) that train now; copies."""
    slot = tuner._slots[name][0]
    return slot.indices_K.clone(), slot.values_K.detach().clone()


def union(tuner: Tuner, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(sorted indices, change since the base) of all entries that train or rest; copies."""
    indices_K, values_K = active(tuner, name)
    parked = tuner.parked.get(name)
    if parked is None:
        return indices_K, values_K
    parked = parked.to(values_K.device)
    indices_U, order_U = torch.cat([indices_K, parked.indices_P]).sort()
    return indices_U, torch.cat([values_K, parked.values_P])[order_U]


def union_size(tuner: Tuner) -> int:
    """Entries that train or rest: what the adapter will hold."""
    return sum(i.numel() for i in tuner.mask.indices.values()) + sum(p.indices_P.numel() for p in tuner.parked.values())


def _resize(parameter: torch.nn.Parameter, values_K: torch.Tensor) -> None:
    """Give the same Parameter other data of another size.

    A loss of an earlier step that is still referred to keeps the node alive in which autograd remembers the old size; torch
    lets go of that node when the dtype changes, so the data go by way of another one.
    """
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=torch.float16, device=values_K.device)
    parameter.data = values_K


def _take(wanted_K: torch.Tensor, indices_U: torch.Tensor, values_U: torch.Tensor) -> torch.Tensor:
    """values_U where `wanted_K` is among the sorted `indices_U`, else 0."""
    found_K = values_U.new_zeros(wanted_K.numel())
    if indices_U.numel():
        place_K = torch.searchsorted(indices_U, wanted_K).clamp(max=indices_U.numel() - 1)
        known_K = indices_U[place_K] == wanted_K
        found_K[known_K] = values_U[place_K[known_K]]
    return found_K


@torch.no_grad()
def set_entries(
    tuner: Tuner, name: str, indices_K: torch.Tensor, values_K: torch.Tensor, indices_P: torch.Tensor, values_P: torch.Tensor
) -> None:
    """Make these the active and the resting entries of one parameter, whatever they were; the weight follows."""
    slots = tuner._slots[name]
    slot, weight = slots[0], slots[0].weight
    device = weight.device
    indices_K, values_K, indices_P, values_P = (t.to(device) for t in (indices_K, values_K, indices_P, values_P))
    scatter(weight, slot.indices_K, slot.base_K)
    if name in tuner.parked:
        scatter(weight, tuner.parked[name].indices_P, tuner.parked[name].base_P)
    union_U = torch.cat([indices_K, indices_P]).sort().values
    tuner.fingerprint[name] = fingerprint(weight, union_U)
    tuner.parked.pop(name, None)
    for each in slots:
        each.reindex(indices_K)
    _resize(slot.values_K, values_K.to(slot.values_K.dtype))
    if indices_P.numel():
        parked = Parked(indices_P, values_P, gather(weight, indices_P))
        tuner.parked[name] = parked
        scatter(weight, indices_P, add_values(parked.base_P, values_P))
    for each in slots:
        each.stale = True
        each.write()


@torch.no_grad()
def remask(tuner: Tuner, mask: SparsityMask, revert: bool = False) -> None:
    """Train the entries of `mask` from now on.

    Entries that leave keep their change and rest (Algorithm 1 of SPEFT folds them into the weights), or return to the base's
    bits with `revert`. Entries that never moved are forgotten. UserError when the mask names other parameters than the tuner's.
    The parameters in tuner.values stay the same objects with other sizes, so an optimizer keeps them; its state does not fit
    any more (see dynamic.py).
    """
    if set(mask.names) != set(tuner._slots):
        odd = sorted(set(mask.names) ^ set(tuner._slots))[0]
        raise UserError(f"a new mask must cover the tuner's parameters (attach with keep_empty=True), {odd} is in only one")
    if dict(mask.shapes) != {n: tuner.mask.shapes[n] for n in mask.names}:
        raise UserError("a new mask must have the shapes of the tuner's parameters, it has others")
    for name, wanted_K in mask.indices.items():
        indices_U, values_U = union(tuner, name)
        wanted_K = wanted_K.to(indices_U.device)
        rest_U = ~torch.isin(indices_U, wanted_K) & (values_U != 0)
        if revert:
            rest_U[:] = False
        set_entries(tuner, name, wanted_K, _take(wanted_K, indices_U, values_U), indices_U[rest_U], values_U[rest_U])
    tuner.mask = mask


def with_parked(tuner: Tuner, name: str, delta: SparseDelta) -> SparseDelta:
    """`delta` of the active entries joined by the resting ones, whose changes are rounded to the delta's dtype and written."""
    parked = tuner.parked.get(name)
    if parked is None:
        return delta
    weight = tuner._slots[name][0].weight
    parked = parked.to(weight.device)
    rounded_P = parked.values_P.to(delta.values_K.dtype)
    tuner.parked[name] = Parked(parked.indices_P, rounded_P.to(parked.values_P.dtype), parked.base_P)
    scatter(weight, parked.indices_P, add_values(parked.base_P, rounded_P))
    indices_U, order_U = torch.cat([delta.indices_K, parked.indices_P.cpu()]).sort()
    return SparseDelta(indices_U, torch.cat([delta.values_K, rounded_P.cpu()])[order_U], delta.shape)


@torch.no_grad()
def put_back(tuner: Tuner) -> None:
    """Put the base's bits back, where entries train, where they rest and in dense parts. Nothing is forgotten: it can be done again.

    Should it fail, what was trained is written again.
    """
    trained = {n: own_part(p).clone() for n, p in tuner._dense_weights.items() if n not in tuner._whole}  # they are nowhere else
    for each in (*chain(*tuner._slots.values()), *tuner._whole.values()):
        each.stale = True  # should writing again fail too: forwards do
    try:
        for name, (slot, *_) in tuner._slots.items():
            if not is_partitioned(slot.weight):  # whose shards never lost them
                scatter(slot.weight, slot.indices_K, slot.base_K)
            if name in tuner.parked:
                scatter(slot.weight, tuner.parked[name].indices_P, tuner.parked[name].base_P)
        for name, parameter in tuner._dense_weights.items():
            own_part(parameter).copy_(tuner._dense_before[name])
    except BaseException:  # Ctrl-C too
        for name, part in trained.items():
            own_part(tuner._dense_weights[name]).copy_(part)
        for name, parked in tuner.parked.items():
            weight = tuner._slots[name][0].weight
            parked = parked.to(weight.device)
            scatter(weight, parked.indices_P, add_values(parked.base_P, parked.values_P))
        tuner.sync()
        raise


def snapshot(tuner: Tuner) -> dict[str, torch.Tensor]:
    """Everything that tells what trains, what rests and by how much it moved; name.{indices,values,rest,moved}."""
    state = {}
    for name in tuner._slots:
        state[f"{name}.indices"], state[f"{name}.values"] = active(tuner, name)
        parked = tuner.parked.get(name)
        state[f"{name}.rest"] = parked.indices_P if parked else state[f"{name}.indices"][:0]
        state[f"{name}.moved"] = parked.values_P if parked else state[f"{name}.values"][:0]
    return state


def load_snapshot(tuner: Tuner, state: Mapping[str, torch.Tensor], made: Mapping[str, object]) -> None:
    """What `snapshot` gave, into a tuner attached to the same parameters of the same base."""
    names = {key.rpartition(".")[0] for key in state}
    if names != set(tuner._slots):
        odd = sorted(names ^ set(tuner._slots))[0]
        raise UserError(f"the saved dynamic mask is of other targets: {odd} is in only one of the two")
    indices = {}
    for name in tuner._slots:
        dtype = index_dtype(tuner._slots[name][0].weight.numel())
        indices[name] = state[f"{name}.indices"].cpu().to(dtype)
        set_entries(
            tuner, name, indices[name], state[f"{name}.values"], state[f"{name}.rest"].to(dtype), state[f"{name}.moved"]
        )
    tuner.mask = SparsityMask(indices, {n: tuner.mask.shapes[n] for n in indices}, dict(made))
