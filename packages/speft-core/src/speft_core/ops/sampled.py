"""The entries by a sampled dense-dense product: what random masks want, which touch every row and column.

Shape suffixes: O outputs, T tokens, R rows with an entry, C columns with an entry, K kept entries.
"""

from __future__ import annotations

import warnings

import torch

from . import triton_sddmm, triton_turn
from .inputs import Inputs
from .layout import Layout


def sampled_entries(inputs: Inputs, grad_y: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sampled dense-dense product (SDDMM) over touched rows and columns: T multiplications an entry, no dense product.

    On CUDA by Triton kernels, where Triton is there; else PyTorch's own, in fp32.
    """
    grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
    if triton_turn.usable(grad_TO, *(factor for factor, _ in inputs.factors)):
        return triton_sddmm.entries(inputs, grad_TO, layout)
    x_TC = inputs.gather(inputs.picks(layout))
    wide = torch.promote_types(grad_TO.dtype, torch.float32)

    def pattern() -> torch.Tensor:
        shape = (layout.rows_R.numel(), layout.cols_C.numel())
        parts = (layout.first_R.to(grad_TO.device, layout.col_of_K.dtype), layout.col_of_K)
        zeros_K = torch.zeros(layout.nnz, dtype=wide, device=grad_TO.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)", UserWarning)
            return torch.sparse_csr_tensor(*parts, zeros_K, size=shape, check_invariants=False)

    grad_RT = grad_TO.T.index_select(0, layout.rows_R).to(wide)
    # beta = 0 leaves the pattern's own values out of it; they stay zeros.
    product = torch.sparse.sampled_addmm(layout.derived(("csr", wide), pattern), grad_RT, x_TC.to(wide), beta=0.0)
    return product.values()
