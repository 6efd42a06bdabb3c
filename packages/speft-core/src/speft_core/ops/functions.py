"""The two autograd functions: a linear layer that hands `values` its k gradient entries, and a tap on any other tensor.

Shape suffixes: O outputs, I inputs, T tokens, K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .layout import Layout
from .plans import Plan


class SparseLinear(torch.autograd.Function):
    """y = x Wᵀ + b with W frozen (it holds base + values already); backward gives grad_x, grad_b and the entries for values.

    x: [..., I]; weight: [O, I]; bias: [O] or None; values_K: any floating dtype. Saves what the plan keeps of x, and W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        values_K: torch.Tensor,
        plan: Plan,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.plan, ctx.layout = plan, layout
        ctx.x_dtype, ctx.values_dtype = x.dtype, values_K.dtype
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not reach into backward: cast here as it would, and keep the weight itself, not its cast copy.
            low = torch.get_autocast_dtype(x.device.type)
            x = x.to(low)
            y = functional.linear(x, weight.to(low), None if bias is None else bias.to(low))
        else:
            y = functional.linear(x, weight, bias)
        kept = plan.keep(x.reshape(-1, x.shape[-1]), layout) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        weight, kept = ctx.saved_tensors
        grad_x = grad_bias = grad_values_K = None
        grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0)
        if ctx.needs_input_grad[3]:
            grad_values_K = ctx.plan.entries(kept, grad_TO, ctx.layout).to(ctx.values_dtype)
        return grad_x, None, grad_bias, grad_values_K, None, None


class Tap(torch.autograd.Function):
    """Stands in for a frozen tensor of any shape: forward returns it as it is, backward gives `pick(dense gradient)`.

    The dense gradient of this one tensor exists while backward passes through it, and is freed at once.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, values_K: torch.Tensor, pick: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.pick = pick
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, ctx.pick(grads[0]), None
