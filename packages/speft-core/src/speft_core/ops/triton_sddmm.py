"""The sampled plan on CUDA: a Triton kernel that reads bf16 (or fp16, fp32) and accumulates in fp32. Never required.

cuSPARSE has no SDDMM for bf16; without Triton the sampled plan widens to fp32 and uses PyTorch's.

Shape suffixes: O outputs, T tokens, R rows with an entry, C columns with an entry, K kept entries.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .layout import Layout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_K, BLOCK_T = 32, 64


@functools.cache
def installed() -> bool:
    """Whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


def usable(grad_TO: torch.Tensor) -> bool:
    """Whether the kernel can run on this gradient: on CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    somewhere = grad_TO.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return somewhere and grad_TO.dtype in DTYPES and installed()


def entries(x_TC: torch.Tensor, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The K entries, fp32. Launches one kernel after two transposing gathers; nothing waits for the device."""
    from .triton_kernel import sddmm_kernel

    out_K = torch.empty(layout.nnz, dtype=torch.float32, device=grad_TO.device)
    if layout.nnz == 0:
        return out_K
    tokens = grad_TO.shape[0]
    grad_RT = grad_TO.T.index_select(0, layout.rows_R).contiguous()
    x_CT = x_TC.T.contiguous()
    blocks = (-(-layout.nnz // BLOCK_K),)
    operands = (grad_RT, x_CT, layout.row_of_K, layout.col_of_K, out_K)
    sddmm_kernel[blocks](*operands, layout.nnz, tokens, BLOCK_K=BLOCK_K, BLOCK_T=BLOCK_T)
    return out_K
