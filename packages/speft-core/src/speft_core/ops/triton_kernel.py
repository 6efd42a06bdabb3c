"""The Triton kernels of the sampled plan. Imported only by triton_sddmm.py, and only where Triton is installed.

Shape suffixes: T tokens, P tokens rounded up to whole blocks, I inputs, R rows with an entry, C columns with an entry, K kept
entries, S stretches of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn_kernel(  # type: ignore[no-untyped-def]
    first, second, third, cols_C, out_CP, columns, tokens, padded,
    first_T, first_I, second_T, second_I, third_T, third_I,
    FACTORS: tl.constexpr, FIRST: tl.constexpr, MADE_2: tl.constexpr, ROUND_2: tl.constexpr, MADE_3: tl.constexpr,
    ROUND_3: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[c, t] = product of the factors at [t, cols[c]]; zeros from `tokens` to `padded`.

    Each factor is a [T, I] tensor of any strides (x_T, x_I). FIRST: what the first factor is rounded to; MADE_n and
    ROUND_n: what the product with factor n has in PyTorch, and what that is rounded to. WHOLE: the columns are all columns, in order.
    """
    at_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C, inside_T = at_C < columns, at_T < tokens
    inside_TC = inside_T[:, None] & inside_C[None, :]
    if WHOLE:
        col_C = at_C.to(tl.int64)
    else:
        col_C = tl.load(cols_C + at_C, mask=inside_C, other=0).to(tl.int64)
    wide_T = at_T.to(tl.int64)
    product_TC = tl.load(first + wide_T[:, None] * first_T + col_C[None, :] * first_I, mask=inside_TC, other=0.0).to(FIRST)
    if FACTORS > 1:
        factor_TC = tl.load(second + wide_T[:, None] * second_T + col_C[None, :] * second_I, mask=inside_TC, other=0.0)
        product_TC = (product_TC.to(tl.float32) * factor_TC.to(tl.float32)).to(MADE_2).to(ROUND_2)
    if FACTORS > 2:
        factor_TC = tl.load(third + wide_T[:, None] * third_T + col_C[None, :] * third_I, mask=inside_TC, other=0.0)
        product_TC = (product_TC.to(tl.float32) * factor_TC.to(tl.float32)).to(MADE_3).to(ROUND_3)
    place_CP = at_C.to(tl.int64)[:, None] * padded + at_T[None, :]
    tl.store(out_CP + place_CP, tl.trans(product_TC), mask=inside_C[:, None] & (at_T < padded)[None, :])


@triton.jit
def sddmm_kernel(  # type: ignore[no-untyped-def]
    grad_RP, x_CP, row_of_K, col_of_K, out_SK, entries, padded, STRETCH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr
):
    """out[s, k] = sum over the tokens t of stretch s of grad[row[k], t] * x[col[k], t], in fp32; both operands zero-padded.

    Programs of one stretch run side by side, so that its part of x stays in the cache.
    """
    at_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_K = at_K < entries
    row_K = tl.load(row_of_K + at_K, mask=inside_K, other=0).to(tl.int64) * padded
    col_K = tl.load(col_of_K + at_K, mask=inside_K, other=0).to(tl.int64) * padded
    sum_KT = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    begin = tl.program_id(1) * STRETCH
    for start in range(0, STRETCH, BLOCK_T):
        at_T = begin + start + tl.arange(0, BLOCK_T)
        inside_T = (at_T < padded)[None, :]
        grad_KT = tl.load(grad_RP + row_K[:, None] + at_T[None, :], mask=inside_T, other=0.0)
        x_KT = tl.load(x_CP + col_K[:, None] + at_T[None, :], mask=inside_T, other=0.0)
        sum_KT += grad_KT.to(tl.float32) * x_KT.to(tl.float32)
    out_K = out_SK + tl.program_id(1).to(tl.int64) * entries + at_K
    tl.store(out_K, tl.sum(sum_KT, axis=1), mask=inside_K)
