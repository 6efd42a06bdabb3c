"""grad_x = grad_y W in the way that is fast on this machine.

Shape suffixes: O outputs, I inputs, T tokens, B columns of a tile.
"""

from __future__ import annotations

import functools

import torch

TILE_ELEMENTS = 1 << 22  # elements of the weight widened at a time: 16 MB of fp32


@functools.cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no matrix kernel for `dtype`, so that PyTorch falls back to a plain loop."""
    try:
        if dtype == torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype == torch.float16:
            return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):
        pass
    return False


def grad_input(grad_TO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """grad_TO @ weight_OI in grad's dtype. On a CPU without kernels for it: in fp32, a tile of the weight at a time.

    PyTorch's fallback runs a bf16 product at 1 to 2 GFLOP/s where the same CPU does 100 in fp32; sums are kept in fp32 either way.
    """
    if grad_TO.device.type != "cpu" or not slow_on_cpu(grad_TO.dtype):
        return grad_TO @ weight_OI.to(grad_TO.dtype)
    grad_x_TI = grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])
    wide_TO = grad_TO.float()
    step = max(1, TILE_ELEMENTS // max(1, weight_OI.shape[0]))
    for start in range(0, weight_OI.shape[1], step):
        grad_x_TI[:, start : start + step] = wide_TO @ weight_OI[:, start : start + step].to(grad_TO.dtype).float()
    return grad_x_TI
