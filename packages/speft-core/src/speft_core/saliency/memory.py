"""Which accumulators go where, and in how many passes, so that a limit on memory holds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import nn

from ..partitioned import own_part, shards_of
from ..targets import base_parameters, parameter_shape
from .sums import wide_dtype


def free_host_memory() -> int:
    """Bytes of host memory that could be had now; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def free_device_memory(device: torch.device) -> int:
    """Bytes that could be had now on a CUDA device, PyTorch's own reserve included."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + idle)


def default_limit(model: nn.Module, names: Sequence[str]) -> int | None:
    """The limit where none is given: half of what is free on the fullest CUDA device, so that batches fit beside the sums."""
    parameters = base_parameters(model)
    devices = {parameters[n].device for n in names if parameters[n].device.type == "cuda"}
    return min((free_device_memory(device) // 2 for device in devices), default=None)


def plan_groups(model: nn.Module, names: Sequence[str], memory_limit: int | None) -> list[dict[str, str]]:
    """Groups of targets, each for one pass over the calibration set: name -> "own" (the parameter's device) or "cpu".

    memory_limit: bytes that accumulators may take on each device of the model (None: no limit). On an accelerator what is beyond
    goes to host memory, half of what is free there; what is beyond that, and on a CPU whatever is beyond the limit, takes
    further passes. A group holds at least one target, in model order. Of partitioned weights each rank has a shard's sum.
    """
    parameters = base_parameters(model)

    def size(parameter: nn.Parameter) -> int:
        entries = own_part(parameter).numel() if shards_of(parameter) > 1 else math.prod(parameter_shape(parameter))
        return entries * wide_dtype(parameter.dtype).itemsize

    sizes = {n: size(parameters[n]) for n in names}
    if memory_limit is None:
        return [dict.fromkeys(names, "own")]
    host_limit = free_host_memory() // 2 if any(parameters[n].device.type not in ("cpu", "meta") for n in names) else 0
    groups: list[dict[str, str]] = []
    left: dict[torch.device, int] = {}
    host_left = -1
    for name in names:
        device = parameters[name].device
        on_device = bool(groups) and sizes[name] <= left.get(device, memory_limit)
        if not on_device and sizes[name] > host_left:
            groups.append({})
            left, host_left, on_device = {}, host_limit, memory_limit >= sizes[name] or host_limit < sizes[name]
        groups[-1][name] = "own" if on_device else "cpu"
        if on_device:
            left[device] = left.get(device, memory_limit) - sizes[name]
        else:
            host_left -= sizes[name]
    return groups
