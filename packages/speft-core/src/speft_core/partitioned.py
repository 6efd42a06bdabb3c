"""Weights that several ranks keep in shards (ZeRO-3): whole for a moment, one at a time, and let go again.

A partitioned parameter is known by what DeepSpeed puts on it; nothing is imported. Its data are empty until it is gathered. Its
shard `ds_tensor` is a stretch of the flat weight: rank r of W holds the entries [r n, (r + 1) n), the last ones padded. All
functions that gather are entered by all ranks in the same order, with the same parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ranks keep the parameter in shards."""
    return "ds_id" in parameter.__dict__


def shards_of(parameter: Any) -> int:
    """In how many shards a parameter lies; 1 for an ordinary one."""
    return int(parameter.ds_zero_partition_world_size) if is_partitioned(parameter) else 1


def own_part(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: its padded shard, flat, or the ordinary parameter's data."""
    part: torch.Tensor = parameter.ds_tensor.data if is_partitioned(parameter) else parameter.data
    return part


def is_absent(parameter: Any) -> bool:
    """Whether only a shard of the parameter is here at the moment."""
    return is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE"


@contextmanager
def whole(parameters: Iterable[Any], change: bool = False) -> Iterator[None]:
    """Within it partitioned parameters are whole on all ranks; ordinary ones always are.

    change: each rank changes them in the same way, and its shard takes that up.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    gathered = [p for p in partitioned if change or is_absent(p)]
    for parameter in gathered:
        parameter.all_gather()
    done = False
    try:
        yield
        done = True
    finally:
        for parameter in gathered:
            parameter.partition(has_been_updated=change and done)


@dataclass(frozen=True)
class _Saved:
    """In the place of a gathered weight that autograd would keep until backward."""

    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


def _restored(saved: torch.Tensor | _Saved) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    with whole([saved.parameter]):
        return saved.parameter.data.as_strided(saved.size, saved.stride, saved.offset)


def _read_by(module: nn.Module) -> list[Any]:
    """The partitioned parameters that a module's forward reads: its own, and in PEFT's layers those of the layer within."""
    inner = getattr(module, "base_layer", None)
    owners = [module, inner] if isinstance(inner, nn.Module) else [module]
    return [p for m in owners for p in m._parameters.values() if p is not None and is_partitioned(p)]


Recompute = Callable[[], AbstractContextManager[None]]


@contextmanager
def gathering(model: nn.Module, start: Callable[[], None] | None = None) -> Iterator[Recompute]:
    """Within it each module's partitioned parameters are whole while its forward runs, and again while its backward does.

    Between the two nothing whole is kept: what autograd saves of a gathered weight is gathered anew. The weights must not
    require gradients. A module that reads another one's parameters fails, for those are empty then. start: called before the
    first gathering of each forward. Yields a context for a checkpointed layer's second forward: what it gathers stays whole
    until the next one begins, for torch keeps the parameters themselves until the layer's backward is through.
    """
    readers = [(module, parameters) for module in model.modules() if (parameters := _read_by(module))]
    users: Counter[Any] = Counter()
    held: dict[int, Any] = {}  # storage of a gathered weight -> the parameter
    opening: list[nn.Module] = []  # the module that every forward starts with
    late: list[Any] = []  # gathered by a second forward
    again = False

    def release() -> None:
        while late:
            late.pop().partition()

    @contextmanager
    def recompute() -> Iterator[None]:
        nonlocal again
        release()
        again = True
        try:
            yield
        finally:
            again = False

    def enter(module: nn.Module, parameters: list[Any]) -> None:
        if late and not again:
            release()
        if not opening:
            opening.append(module)
        if start is not None and module is opening[0]:
            start()
        for parameter in parameters:
            users[parameter] += 1
            if is_absent(parameter):
                parameter.all_gather()
                held[parameter.data.untyped_storage().data_ptr()] = parameter

    def leave(parameters: list[Any]) -> None:
        for parameter in parameters:
            users[parameter] = max(0, users[parameter] - 1)  # `start` may have ended the forward before it was counted
            if not users[parameter] and held.pop(parameter.data.untyped_storage().data_ptr(), None) is not None:
                late.append(parameter) if again else parameter.partition()

    def keep(tensor: torch.Tensor) -> torch.Tensor | _Saved:
        parameter = held.get(tensor.untyped_storage().data_ptr()) if held and tensor.layout == torch.strided else None
        if parameter is None or tensor.dtype != parameter.dtype:
            return tensor
        return _Saved(parameter, tensor.size(), tensor.stride(), tensor.storage_offset())

    hooks = []
    for module, parameters in readers:
        hooks.append(module.register_forward_pre_hook(lambda m, _x, p=parameters: enter(m, p)))
        hooks.append(module.register_forward_hook(lambda _m, _x, _y, p=parameters: leave(p), always_call=True))
    try:
        if not readers:
            yield nullcontext
            return
        with torch.autograd.graph.saved_tensors_hooks(keep, _restored):
            yield recompute
    finally:
        release()
        for hook in hooks:
            hook.remove()
