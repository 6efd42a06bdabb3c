"""Columns of an input, turned so that tokens lie side by side: one Triton kernel gathers, multiplies and transposes. Never required.

Shape suffixes: T tokens, P tokens rounded up to whole blocks, I inputs, C columns asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PADDING = 128  # tokens are rounded up to a multiple, which the kernels need not check
TURN_C, TURN_T = 64, 64  # a tile of the transposition
ROUNDINGS = ("FIRST", "MADE_2", "ROUND_2", "MADE_3", "ROUND_3")  # the kernel's names for what is rounded to what


@functools.cache
def installed() -> bool:
    """Whether Triton is there, and not turned off by SPEFT_TRITON=0."""
    return os.environ.get("SPEFT_TRITON") != "0" and importlib.util.find_spec("triton") is not None


@functools.cache
def works(device: torch.device) -> bool:
    """Whether a kernel runs on this device: tried once, since Triton may lack a compiler or not know the GPU."""
    try:
        turned([(torch.ones(1, 1, device=device), torch.float32)], None)
    except Exception as error:
        log.warning("Triton cannot run on %s, PyTorch's operators serve instead: %s", device, str(error).strip().partition("\n")[0])
        return False
    return True


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can run on all of them: on one CUDA device, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    device = tensors[0].device
    somewhere = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    fit = all(tensor.dtype in DTYPES and tensor.device == device for tensor in tensors)
    return somewhere and fit and installed() and works(device)


def turned(factors: Sequence[tuple[torch.Tensor, torch.dtype]], picks_C: torch.Tensor | None) -> torch.Tensor:
    """[C, P]: columns `picks_C` (None: all) of the product of the factors (as in Inputs, at most three), padded with zeros.

    The same bits as multiplying and rounding one factor after the other.
    """
    import triton.language as tl

    from .triton_kernel import turn_kernel

    known = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    dtypes = [factors[0][1]]
    for factor, dtype in factors[1:]:
        dtypes += [torch.promote_types(dtypes[-1], factor.dtype), dtype]
    tokens, width = factors[0][0].shape
    columns = width if picks_C is None else picks_C.numel()
    padded = -(-tokens // PADDING) * PADDING
    out_CP = torch.empty(columns, padded, dtype=factors[-1][1], device=factors[0][0].device)
    if not out_CP.numel():
        return out_CP
    three = [factors[min(n, len(factors) - 1)][0] for n in range(3)]
    strides = [stride for factor in three for stride in factor.stride()]
    places = out_CP if picks_C is None else picks_C  # not read when all columns are asked for
    grid = (-(-columns // TURN_C), -(-padded // TURN_T))
    with torch.cuda.device_of(out_CP):  # Triton launches on the current GPU, whatever its operands lie on
        turn_kernel[grid](
            *three, places, out_CP, columns, tokens, padded, *strides, FACTORS=len(factors),
            **{name: known[dtype] for name, dtype in zip(ROUNDINGS, dtypes + dtypes[-1:] * 4, strict=False)},
            WHOLE=picks_C is None, BLOCK_C=TURN_C, BLOCK_T=TURN_T,
        )  # fmt: skip
    return out_CP
