"""The Triton kernel of the sampled plan. Imported only by triton_sddmm.py, and only where Triton is installed.

Shape suffixes: T tokens, R rows with an entry, C columns with an entry, K kept entries.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sddmm_kernel(  # type: ignore[no-untyped-def]
    grad_RT, x_CT, row_of_K, col_of_K, out_K, entries, tokens, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr
):
    """out[k] = sum over t of grad[row[k], t] * x[col[k], t], in fp32; both operands contiguous along the tokens."""
    at_K = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_K = at_K < entries
    row_K = tl.load(row_of_K + at_K, mask=inside_K, other=0).to(tl.int64)
    col_K = tl.load(col_of_K + at_K, mask=inside_K, other=0).to(tl.int64)
    sum_KT = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        at_T = start + tl.arange(0, BLOCK_T)
        mask_KT = inside_K[:, None] & (at_T < tokens)[None, :]
        grad_KT = tl.load(grad_RT + row_K[:, None] * tokens + at_T[None, :], mask=mask_KT, other=0.0)
        x_KT = tl.load(x_CT + col_K[:, None] * tokens + at_T[None, :], mask=mask_KT, other=0.0)
        sum_KT += grad_KT.to(tl.float32) * x_KT.to(tl.float32)
    tl.store(out_K + at_K, tl.sum(sum_KT, axis=1), mask=inside_K)
