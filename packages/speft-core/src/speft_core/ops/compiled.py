"""The sparse linear layer as one opaque operator, for torch.compile: no graph break, no tracing into the plans.

The operator writes base + values into the weight before it multiplies; the write is not declared, because nothing else in a graph
depends on when it happens: all that reads the weight goes through this operator.

Shape suffixes: O outputs, I inputs, T tokens, C columns with an entry, K kept entries.
"""

# No `from __future__ import annotations`: the operator's schema is read from the annotations.

import itertools
import weakref
from typing import Any

import torch
from torch.nn import functional

from .inputs import Inputs
from .layout import Layout
from .matmul import grad_input

_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def enroll(slot: Any) -> str:
    """A key by which the operator finds `slot` (its plan, its layout and its write) at run time.

    Text: of a number that is another one in each layer a compiler makes a size that may vary.
    """
    key = str(next(_numbers))
    _slots[key] = slot
    return key


def _layout(key: str, device: torch.device) -> Layout:
    layout: Layout = _slots[key].work_on(device).layout
    return layout


@torch.library.custom_op("speft::linear", mutates_args=())
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, values_K: torch.Tensor, key: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b after writing base + values into W, and x[:, C] (an empty tensor unless `keep`)."""
    slot = _slots[key]
    slot.stale = True  # an operator runs without grad mode, from which `write` would conclude that nothing can have changed
    slot.write()
    slot.stale = keep
    y = functional.linear(x, weight.to(x.dtype), bias)
    if not keep:
        return y, x.new_empty(0, 0)
    kept_TC = x.reshape(-1, x.shape[-1]).index_select(1, _layout(key, x.device).cols_C)
    return y, kept_TC


@linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, values_K: torch.Tensor, key: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if not keep:
        return y, x.new_empty(0, 0)
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    return y, x.new_empty(tokens, _slots[key].layout.cols_C.numel())


@torch.library.custom_op("speft::linear_backward", mutates_args=())
def linear_backward(
    grad_y: torch.Tensor, weight: torch.Tensor, kept_TC: torch.Tensor, key: str, with_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_x in the shape of x (an empty tensor unless `with_x`), and the gradient of the K kept entries."""
    slot, layout = _slots[key], _layout(key, grad_y.device)
    slot.together.over()
    inputs = Inputs([(kept_TC, kept_TC.dtype)], layout.cols_C, "own")
    grad_values_K = slot.plan.entries(inputs, grad_y, layout).to(slot.values_K.dtype)
    if not with_x:
        return grad_y.new_empty(0), grad_values_K
    return grad_input(grad_y, weight), grad_values_K


@linear_backward.register_fake
def _(
    grad_y: torch.Tensor, weight: torch.Tensor, kept_TC: torch.Tensor, key: str, with_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    slot = _slots[key]
    grad_values_K = grad_y.new_empty(slot.layout.nnz, dtype=slot.values_K.dtype)
    if not with_x:
        return grad_y.new_empty(0), grad_values_K
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1]), grad_values_K


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, weight, _, _, ctx.key, _ = inputs
    ctx.save_for_backward(weight, output[1])


def _backward(ctx: Any, grad_y: torch.Tensor, _grad_kept: Any) -> tuple[torch.Tensor | None, ...]:
    weight, kept_TC = ctx.saved_tensors
    grad_x, grad_values_K = torch.ops.speft.linear_backward(grad_y, weight, kept_TC, ctx.key, ctx.needs_input_grad[0])
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return (grad_x if ctx.needs_input_grad[0] else None), None, grad_bias, grad_values_K, None, None


linear.register_autograd(_backward, setup_context=_setup)
