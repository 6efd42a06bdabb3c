"""The two autograd functions: a linear layer that hands `values` its k gradient entries, and a tap on any other tensor.

Shape suffixes: O outputs, I inputs, T tokens, K kept entries, U columns kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import Inputs
from .keep import Keeper, kept_columns
from .layout import Layout
from .matmul import grad_input, linear
from .plans import Plan
from .recipes import Recipe


@dataclass(frozen=True, eq=False)
class Work:
    """What a layer's backward does, the same at every step. over: called when it comes."""

    plan: Plan
    layout: Layout
    keeper: Keeper | None = None
    over: Callable[[], None] | None = None


class SparseLinear(torch.autograd.Function):
    """y = x Wᵀ + b with W frozen (it holds base + values already); backward gives grad_x, grad_b and the entries for values.

    x: [..., I]; weight: [O, I]; bias: [O] or None; values_K: any floating dtype. recipe: how backward makes x again; without
    one, forward keeps the columns that the work's keeper names (the layout's own when None). Saves W and at most those columns.
    rewrite: for a weight whose shards are gathered anew for backward, without the values: writes base + values again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        values_K: torch.Tensor,
        work: Work,
        recipe: Recipe | None = None,
        rewrite: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        ctx.work, ctx.rewrite = work, rewrite
        ctx.x_dtype, ctx.values_K = x.dtype, values_K
        given = x
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not reach into backward: cast here as it would, and keep the weight itself, not its cast copy.
            low = torch.get_autocast_dtype(x.device.type)
            x = x.to(low)
            y = linear(x, weight.to(low), None if bias is None else bias.to(low))
        else:
            y = linear(x, weight, bias)
        ctx.low, ctx.recipe, kept = x.dtype, None, None
        if ctx.needs_input_grad[3]:
            if recipe is not None:
                ctx.recipe = recipe
                recipe.readers += 1
                if work.plan.shares:
                    recipe.shared.append(work.layout)
            else:
                kept, ctx.columns_U, ctx.key = kept_columns(given, x, work.layout, work.keeper)
        ctx.save_for_backward(weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: entries are formed without a graph
            with torch.no_grad():
                found = SparseLinear._gradients(ctx, *grads)
            return _Once.apply(*grads, ctx.values_K, *found)
        return SparseLinear._gradients(ctx, *grads)

    @staticmethod
    def _gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,), work = grads, ctx.work
        weight, kept = ctx.saved_tensors
        wants_x, _, wants_bias, wants_values = ctx.needs_input_grad[:4]
        grad_x = grad_bias = grad_values_K = None
        if work.over is not None:
            work.over()
        if wants_values:
            if kept is None:
                factors = ctx.recipe.factors()
                factors[-1] = (factors[-1][0], ctx.low)
                inputs = Inputs(factors, recipe=ctx.recipe)
            else:
                inputs = Inputs([(kept, ctx.low)], ctx.columns_U, ctx.key)
            grad_values_K = _cast(work.plan.entries(inputs, grad_y, work.layout), ctx.values_K.dtype)
        if wants_x:
            if ctx.rewrite is not None:
                ctx.rewrite()
            grad_x = _cast(grad_input(grad_y, weight), ctx.x_dtype)
        if wants_bias:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        return grad_x, None, grad_bias, grad_values_K, None, None, None


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # hundreds of times a step, each call with cold caches


class _Once(torch.autograd.Function):
    """Gradients that follow from grad_y and values_K by a way unknown to autograd: a derivative of theirs raises and is not left out.

    Also where grad_y is a constant, since grad_x depends on the values, and where torch.autograd.grad looks for paths to a tensor.
    """

    @staticmethod
    def forward(ctx: Any, grad_y: torch.Tensor, values_K: torch.Tensor, *found: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if f is None else f.detach() for f in found)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise RuntimeError("an attached linear layer has no second derivatives, got a loss made of its gradients (create_graph=True)")


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
