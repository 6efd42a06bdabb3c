"""Columns of an input, turned so that tokens lie side by side: one Triton kernel gathers, multiplies and transposes. Never required.

Shape suffixes: T tokens, P tokens rounded up to whole blocks, I inputs, C columns asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PADDING = 128  # tokens are rounded up to a multiple, which the kernels need not check
TURN_C, TURN_T = 64, 64  # a tile of the transposition


@functools.cache
def installed() -> bool:
    """Whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels can run on it: on CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    somewhere = tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return somewhere and tensor.dtype in DTYPES and installed()


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
    turn_kernel[grid](
        *three, places, out_CP, columns, tokens, padded, *strides, FACTORS=len(factors),
        DTYPES=tuple(known[dtype] for dtype in dtypes), WHOLE=picks_C is None, BLOCK_C=TURN_C, BLOCK_T=TURN_T,
    )  # fmt: skip
    return out_CP
