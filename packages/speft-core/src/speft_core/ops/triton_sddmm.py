"""The sampled plan on CUDA: a Triton kernel that reads bf16 (or fp16, fp32) and accumulates in fp32. Never required.

cuSPARSE has no SDDMM for bf16; without Triton the sampled plan widens to fp32 and uses PyTorch's.

Shape suffixes: O outputs, T tokens, P tokens rounded up to whole blocks, R rows with an entry, C columns with an entry, K kept
entries, S stretches of tokens.
"""

from __future__ import annotations

import torch

from .cut import Cut
from .inputs import Inputs
from .layout import Layout
from .triton_turn import turned

BLOCK_K, BLOCK_T = 32, 64  # entries and tokens that a program takes at a time
WHOLE_ABOVE = 0.3  # share of rows or columns from which on all are turned, which reads memory in order
STRETCHES = (512, 1024, 2048)  # tokens of one program
SUMS = 1 << 26  # partial sums of all stretches together, 256 MB: beyond, stretches become longer
CACHED = 1 << 23  # elements of x that programs side by side may read: they then come from the cache (16 MB in bf16)


def entries(inputs: Inputs, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The K entries, fp32. Both operands are turned so that tokens lie side by side; nothing waits for the device."""
    from .triton_kernel import sddmm_kernel

    if layout.nnz == 0 or grad_TO.shape[0] == 0:
        return torch.zeros(layout.nnz, dtype=torch.float32, device=grad_TO.device)
    width = inputs.factors[0][0].shape[1]
    rows, columns, row_of_K, col_of_K = layout.derived(("turned", inputs.key, width), lambda: _cuts(inputs, layout, width))
    grad_RP = turned([(grad_TO, grad_TO.dtype)], rows.picks_P)
    x_CP = turned(inputs.factors, columns.picks_P)
    padded = grad_RP.shape[1]
    stretch = next((s for s in reversed(STRETCHES) if s * x_CP.shape[0] <= CACHED), STRETCHES[0])
    while stretch < padded and -(-padded // stretch) * layout.nnz > SUMS:
        stretch *= 2
    stretches = -(-padded // stretch)
    out_SK = torch.empty(stretches, layout.nnz, dtype=torch.float32, device=grad_TO.device)
    operands = (grad_RP, x_CP, row_of_K, col_of_K, out_SK, layout.nnz, padded)
    grid = (-(-layout.nnz // BLOCK_K), stretches)
    with torch.cuda.device_of(out_SK):
        sddmm_kernel[grid](*operands, STRETCH=stretch, BLOCK_K=BLOCK_K, BLOCK_T=BLOCK_T)
    return out_SK[0] if stretches == 1 else out_SK.sum(0)


def _cuts(inputs: Inputs, layout: Layout, width: int) -> tuple[Cut, Cut, torch.Tensor, torch.Tensor]:
    """Which rows and columns are turned, and each entry's place among them."""
    rows = Cut.of(layout.rows_R, layout.shape[0], WHOLE_ABOVE)
    columns = Cut.of(inputs.places(layout), width, WHOLE_ABOVE)
    return rows, columns, rows.places_N[layout.row_of_K].contiguous(), columns.places_N[layout.col_of_K].contiguous()
