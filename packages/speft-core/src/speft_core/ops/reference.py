"""The oracle: what every plan must compute, in the plainest torch. Used by tests, never by training.

Shape suffixes: O outputs, I inputs, T tokens, K kept entries.
"""

from __future__ import annotations

import torch


def weight_gradient_entries(x: torch.Tensor, grad_y: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """The entries at flat `indices_K` of dL/dW = grad_yᵀ x for y = x Wᵀ.

    x: [..., I], grad_y: [..., O] with the same leading sizes, indices into the [O, I] weight. Returns K values in fp32, or
    float64 for float64 inputs (the products are formed in that dtype).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_TI = x.reshape(-1, x.shape[-1]).to(wide)
    grad_TO = grad_y.reshape(-1, grad_y.shape[-1]).to(wide)
    grad_OI = grad_TO.T @ x_TI
    return grad_OI.reshape(-1)[indices_K.long()]
