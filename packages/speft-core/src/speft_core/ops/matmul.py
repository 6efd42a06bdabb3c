"""grad_x = grad_y W in the way that is fast on this machine.

Shape suffixes: O outputs, I inputs, T tokens, B columns of a tile.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from torch.nn import functional

from . import pieces

TILE_ELEMENTS = 1 << 22  # elements of the weight widened at a time: 16 MB of fp32
TILE_TOKENS = 1024  # tokens of grad_y widened at a time


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


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU has AMX, whose bf16 product is many times faster than its fp32 one."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def wider_is_faster(dtype: torch.dtype) -> bool:
    """Whether an fp32 product beats this CPU's own for `dtype`: where there is no kernel for it, and in bf16 on Intel's without AMX.

    Their AVX-512 bf16 instructions multiply no faster than fp32 ones; the kernels around them are 1.4 to 1.5 times slower
    on most shapes (measured on a Xeon of the Sapphire Rapids generation; `python benchmarks/products.py`).
    """
    if slow_on_cpu(dtype):
        return True
    if dtype != torch.bfloat16 or has_tiles() or not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch does not know the CPU
        return False
    return "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's product as an operator, the one that inductor calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's fp32 product beats MKL's, which PyTorch takes: on AMD's CPUs with AVX-512, by 4 to 9 %.

    Measured on Zen 4 (`python benchmarks/products.py`).
    """
    if not (has_onednn() and torch.backends.mkl.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    found = torch.cpu.get_capabilities()
    return "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_f"))


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x [..., I] times weight_OI transposed, plus bias_O: functional.linear with its bits, without a derivative."""
    if bias_O is None and has_tiles():
        return pieces.product(x, weight_OI.t(), torch.matmul)
    return functional.linear(x, weight_OI, bias_O)


def grad_input(grad_y: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """grad_y [..., O] times weight_OI, [..., I] in grad_y's dtype, by the library that is fastest on this machine. On a CPU where
    fp32 is faster: in fp32, a tile at a time.

    PyTorch's fallback runs a bf16 product at 1 to 2 GFLOP/s where the same CPU does 100 in fp32; sums are kept in fp32 either way.
    """
    if grad_y.is_contiguous() and (not grad_y.is_cpu or not wider_is_faster(grad_y.dtype)):
        return _product(grad_y, weight_OI)  # whose operators fold the tokens themselves: less Python, hundreds of times a step
    grad_TO = grad_y.reshape(math.prod(grad_y.shape[:-1]), grad_y.shape[-1])
    slow = grad_TO.is_cpu and wider_is_faster(grad_TO.dtype)
    grad_x_TI = _in_tiles(grad_TO, weight_OI) if slow else _product(grad_TO, weight_OI)
    return grad_x_TI.view(*grad_y.shape[:-1], weight_OI.shape[1])


def _product(grad_y: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    if weight_OI.dtype != grad_y.dtype:
        weight_OI = weight_OI.to(grad_y.dtype)
    if _takes_onednn(grad_y, weight_OI):
        return onednn_product(grad_y, weight_OI)
    return pieces.product(grad_y, weight_OI, torch.matmul) if has_tiles() else grad_y @ weight_OI


def _in_tiles(grad_TO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and grad_TO.requires_grad:  # a second derivative goes through here
        return (grad_TO.float() @ weight_OI.to(grad_TO.dtype).float()).to(grad_TO.dtype)
    (tokens, outputs), inputs = grad_TO.shape, weight_OI.shape[1]
    grad_x_TI = grad_TO.new_empty(tokens, inputs)
    step = max(1, TILE_ELEMENTS // max(1, outputs))
    for left in range(0, inputs, step):
        weight_OB = weight_OI[:, left : left + step].to(grad_TO.dtype)
        wide_OB = _scratch("weight", weight_OB.shape).copy_(weight_OB)
        for first in range(0, tokens, TILE_TOKENS):
            part_TO = grad_TO[first : first + TILE_TOKENS]
            wide_TO = _scratch("grad", part_TO.shape).copy_(part_TO)
            product_TB = torch.mm(wide_TO, wide_OB, out=_scratch("product", (part_TO.shape[0], wide_OB.shape[1])))
            grad_x_TI[first : first + TILE_TOKENS, left : left + step] = product_TB
    return grad_x_TI


def _takes_onednn(grad_y: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """An fp32 product on the CPU that is not empty, of which no derivative is asked: oneDNN's operator has none."""
    if grad_y.dtype != torch.float32 or not grad_y.is_cpu or not (grad_y.numel() and weight_OI.numel()):
        return False
    if torch.is_grad_enabled() and (grad_y.requires_grad or weight_OI.requires_grad):
        return False
    return onednn_is_faster() and bool(torch._C._get_mkldnn_enabled())


def onednn_product(grad_y: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """grad_y @ weight_OI by oneDNN: [..., O] and [O, I], fp32 on the CPU, any strides; without a derivative. Needs `has_onednn`."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(grad_y, weight_OI.t(), None, "none", [], "")
    return product


_local = threading.local()


def _scratch(name: str, shape: Sequence[int]) -> torch.Tensor:
    """An fp32 buffer of this thread, kept between calls: fresh pages for every layer cost as much as widening does."""
    kept: dict[str, torch.Tensor] = _local.__dict__
    if name not in kept or kept[name].numel() < math.prod(shape):
        kept[name] = torch.empty(math.prod(shape))
    return kept[name][: math.prod(shape)].view(*shape)
