"""The mean signed gradient of chosen parameters over a calibration set, without a weight ever requiring grad.

Linear weights get a backward that adds grad_yᵀ x to an fp32 accumulator; all other parameters a tap (ops/functions.py) whose
dense gradient is added and freed. So nothing but the accumulators outlives a layer's backward.

Shape suffixes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import UserError
from ..ops.functions import Tap
from ..targets import base_parameters, owners_of, parameter_shape

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], torch.Tensor]
ROW_TILE = 1 << 20  # elements of a gradient formed at a time where it has to be widened to fp32 first


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The default loss: what the model returns as `.loss` (or `["loss"]`) for a batch with labels."""
    output = model(**batch)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise UserError("the model returned no loss; give batches with labels, or a loss_fn(model, batch)")
    return loss


def batch_size(batch: Batch) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0]
    raise UserError("a calibration batch must hold at least one tensor whose first dimension counts the examples")


class _AccumulatingLinear(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward adds scale · grad_yᵀ x to the accumulator. `anchor` makes backward come by."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        anchor: torch.Tensor,
        sum_OI: Accumulator,
    ) -> torch.Tensor:
        ctx.sum_OI, ctx.x_dtype = sum_OI, x.dtype
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, weight = ctx.saved_tensors
        grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
        ctx.sum_OI.add_product(grad_TO, x.reshape(-1, x.shape[-1]))
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_bias = grad_TO.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None


class Accumulator:
    """The running mean gradient of one parameter, fp32 (float64 for float64 weights), in the parameter's shape.

    `scale` is the share of the present batch; set before each backward.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.sum = torch.zeros(parameter_shape(parameter), dtype=wide, device=parameter.device)
        self.scale = 1.0

    def add_product(self, grad_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add scale · grad_TOᵀ x_TI; narrow inputs are widened a tile of rows at a time."""
        if grad_TO.dtype == self.sum.dtype:
            self.sum.addmm_(grad_TO.T, x_TI, alpha=self.scale)
            return
        wide_TI = x_TI.to(self.sum.dtype)
        step = max(1, ROW_TILE // max(1, grad_TO.shape[0]))
        for start in range(0, self.sum.shape[0], step):
            tile_TO = grad_TO[:, start : start + step].to(self.sum.dtype)
            self.sum[start : start + step].addmm_(tile_TO.T, wide_TI, alpha=self.scale)

    def add(self, grad: torch.Tensor) -> None:
        """Add scale · grad, a dense gradient in the parameter's shape."""
        self.sum.add_(grad.to(self.sum.dtype), alpha=self.scale)


class _ScoringForward:
    """Replaces a module's forward during the pass."""

    def __init__(self, module: nn.Module, sums: dict[str, Accumulator]) -> None:
        self.module, self.sums, self.original = module, sums, module.forward
        self.had_own = module.__dict__.get("forward")
        self.is_fast = type(module) is nn.Linear and self.had_own is None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        taps = {}
        for attribute, accumulator in self.sums.items():
            parameter = self.module._parameters[attribute]
            assert parameter is not None
            if not (self.is_fast and attribute == "weight" and len(args) == 1):
                taps[attribute] = Tap.apply(parameter, _anchor(parameter), _discarding(accumulator))
        if len(taps) < len(self.sums):
            weight = self.module._parameters["weight"]
            assert weight is not None
            bias = taps.get("bias", self.module.bias)
            return _AccumulatingLinear.apply(args[0], weight, bias, _anchor(weight), self.sums["weight"])
        try:
            self.module.__dict__.update(taps)
            return self.original(*args, **kwargs)
        finally:
            for attribute in taps:
                self.module.__dict__.pop(attribute, None)

    def remove(self) -> None:
        """Give the forward back."""
        if self.had_own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.had_own  # type: ignore[method-assign]


def _anchor(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(0, dtype=parameter.dtype, device=parameter.device, requires_grad=True)


def _discarding(accumulator: Accumulator) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(grad: torch.Tensor) -> torch.Tensor:
        accumulator.add(grad)
        return grad.new_zeros(0)

    return add


@contextmanager
def accumulating(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Accumulator]]:
    """While open, every backward through `model` adds to the accumulators of `names`; all weights are frozen meanwhile."""
    parameters, owners = base_parameters(model), owners_of(model)
    sums = {n: Accumulator(parameters[n]) for n in names}
    by_module: dict[nn.Module, dict[str, Accumulator]] = {}
    for name in names:
        for module, attribute in owners[id(parameters[name])]:
            by_module.setdefault(module, {})[attribute] = sums[name]
    required = {p: p.requires_grad for p in model.parameters()}
    forwards = [_ScoringForward(module, attributes) for module, attributes in by_module.items()]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        for forward in forwards:
            forward.module.forward = forward  # type: ignore[method-assign]
        yield sums
    finally:
        for forward in forwards:
            if forward.module.__dict__.get("forward") is forward:
                forward.remove()
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)


def mean_gradient(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], loss_fn: LossFn | None = None
) -> dict[str, torch.Tensor]:
    """The mean over examples of the signed gradient: name -> fp32 tensor in the parameter's shape (SPEFT, section 3).

    Each batch counts by its number of examples, so that a short last batch weighs less. Dropout is off meanwhile. UserError
    for no batches, a batch with no loss, or a loss that is not finite (naming the batch).
    """
    loss_fn = loss_fn or model_loss
    batches = list(batches)
    if not batches:
        raise UserError("a data-driven metric needs at least one calibration batch, got none")
    sizes = [batch_size(b) for b in batches]
    was_training = model.training
    model.eval()
    try:
        with accumulating(model, names) as sums, torch.enable_grad():
            for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
                for accumulator in sums.values():
                    accumulator.scale = size / sum(sizes)
                loss = loss_fn(model, batch)
                if not bool(torch.isfinite(loss)):
                    raise UserError(f"the calibration loss must be finite, batch {number} gives {loss.item()}")
                loss.backward()
        return {n: a.sum for n, a in sums.items()}
    finally:
        model.train(was_training)
