"""Sums over a calibration set of something made from each parameter's gradient, without a weight ever requiring grad.

Linear weights get a backward that adds to an accumulator (fp32, or float64) what a rule makes of grad_y and x: their product
(the gradient), or a function of each example's product. All other parameters get a tap (ops/functions.py) whose dense
gradient is added and freed. So nothing but the accumulators outlives a layer's backward. An accumulator may live in host
memory: products are formed where the model is, then added, so that the bits do not depend on where it lives.

Shape suffixes: B examples, T tokens (of an example, or all), O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..ops.functions import Tap
from ..ops.matmul import grad_input
from ..partitioned import Recompute, gathering, is_partitioned
from ..slots import AttachedForward, standing_in
from ..targets import base_parameters, owners_of
from .sums import Accumulator

TILE_ELEMENTS = 1 << 20  # elements of a product formed at a time: 4 MB of fp32


@dataclass
class Examples:
    """What the present batch says of its examples: their number, tokens each, and the share of each in the batch's loss.

    added: targets that got a term from this batch. mixed: those of which no batch gives each example's gradient by itself.
    """

    count: int = 0
    length: int | None = None
    share_B: torch.Tensor | None = None
    added: set[str] = field(default_factory=set)
    mixed: set[str] = field(default_factory=set)

    def takes(self, total: Accumulator) -> bool:
        """Whether a term of `total` is an example's whole gradient: not a second one, from a module that is called again.

        What the ranks share gets a term of every batch in any case, as other ranks may have one to add.
        """
        if total.name in self.added:
            self.mixed.add(total.name)
        elif total.name in self.mixed:
            total.skip()
        self.added.add(total.name)
        return total.name not in self.mixed

    def split(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x` as [B, T, features], which may come as [B, ..., features] or flattened to [B · T, features]; None for what starts
        with no examples, as the labelled positions of all in one row.
        """
        if x.dim() >= 2 and x.shape[0] == self.count:
            return x.reshape(self.count, -1, x.shape[-1])
        if x.dim() == 2 and self.length and x.shape[0] == self.count * self.length:
            return x.reshape(self.count, self.length, x.shape[-1])
        return None


@dataclass(frozen=True)
class Rule:
    """What is summed. `of_example` is applied to each example's gradient; None sums the plain gradient over the batch."""

    of_example: Callable[[torch.Tensor], torch.Tensor] | None = None

    def product(self, total: Accumulator, left: torch.Tensor, right: torch.Tensor, examples: Examples) -> None:
        """Add leftᵀ right, in the accumulator's dtype: grad_y and x for a weight [O, I] (for Conv1D the other way round).

        Per example, grad_y must be scaled already.
        """
        dtype = total.dtype
        if self.of_example is None:
            left_TO, right_TI = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1]).to(dtype)
            step = max(1, TILE_ELEMENTS // max(1, right_TI.shape[1]))
            for start in range(0, left_TO.shape[1], step):
                total.add_product(left_TO[:, start : start + step], right_TI, start)
            return
        left_BTO, right_BTI = examples.split(left), examples.split(right)
        assert left_BTO is not None and right_BTI is not None, "the scorer has looked"
        right_BTI = right_BTI.to(dtype)
        step = max(1, TILE_ELEMENTS // max(1, right_BTI.shape[0] * right_BTI.shape[2]))
        for start in range(0, left_BTO.shape[2], step):
            product_BOI = left_BTO[:, :, start : start + step].to(dtype).transpose(1, 2) @ right_BTI
            total.add(self.of_example(product_BOI).sum(0), start)

    def bias(self, sum_O: Accumulator, grad_y: torch.Tensor, examples: Examples) -> None:
        """Add for a bias [O] that is added to every row of y."""
        if self.of_example is None:
            sum_O.add(grad_y.reshape(-1, grad_y.shape[-1]).to(sum_O.dtype).sum(0))
        else:
            sum_O.add(self.of_example(self.scaled(sum_O, grad_y, examples).sum(1)).sum(0))

    def scaled(self, total: Accumulator, grad_y: torch.Tensor, examples: Examples) -> torch.Tensor:
        """grad_y of each example's own loss instead of its share of the batch's, [B, T, O]; unchanged for plain sums."""
        if self.of_example is None:
            return grad_y
        split_BTO = examples.split(grad_y)
        assert split_BTO is not None, "the scorer has looked"
        grad_BTO = split_BTO.to(total.dtype)
        if examples.share_B is None:
            return grad_BTO
        share_B = examples.share_B.to(grad_BTO)
        return grad_BTO * torch.where(share_B > 0, 1.0 / share_B, 0.0)[:, None, None]


class _AccumulatingLinear(torch.autograd.Function):
    """y = x Wᵀ + b (Conv1D: x W + b), whose backward adds to the scorer's accumulators. `anchor` makes backward come by."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, anchor: torch.Tensor | None, scorer: _Scorer
    ) -> torch.Tensor:
        ctx.scorer = scorer
        ctx.save_for_backward(weight, x if "weight" in scorer.sums else None)
        if not scorer.transposed:
            return functional.linear(x, weight, bias)
        assert bias is not None
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        weight, x = ctx.saved_tensors
        ctx.scorer.add(grad_y, x)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        grad_x = grad_input(grad_y.reshape(-1, grad_y.shape[-1]), weight.T if ctx.scorer.transposed else weight)
        return grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1]), None, None, None, None


class _Scorer:
    """Replaces a module's forward during the pass. `sums`: parameter attribute -> accumulator, maybe none."""

    def __init__(self, module: nn.Module, sums: Mapping[str, Accumulator], rule: Rule, examples: Examples) -> None:
        self.module, self.sums, self.rule, self.examples = module, sums, rule, examples
        self.had_own = module.__dict__.get("forward")
        self.original: Callable[..., Any] = module.forward
        self.transposed = is_conv1d(module)
        self.is_fast = self.had_own is None and (type(module) is nn.Linear or self.transposed)

    def add(self, grad_y: torch.Tensor, x: torch.Tensor | None) -> None:
        """Called by backward with the gradient of the module's output and, where the weight is scored, its input."""
        single = self.rule.of_example is not None
        if single and (self.examples.split(grad_y) is None or (x is not None and self.examples.split(x) is None)):
            self.examples.mixed.update(total.name for total in self.sums.values())
        if x is not None and not (single and not self.examples.takes(self.sums["weight"])):
            total = self.sums["weight"]
            grad = self.rule.scaled(total, grad_y, self.examples)
            left, right = (x, grad) if self.transposed else (grad, x)
            self.rule.product(total, left, right, self.examples)
            total.end()
        if "bias" in self.sums and not (single and not self.examples.takes(self.sums["bias"])):
            self.rule.bias(self.sums["bias"], grad_y, self.examples)
            self.sums["bias"].end()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if self.is_fast and len(args) == 1 and not kwargs and not torch.is_autocast_enabled(args[0].device.type):
            weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
            assert weight is not None
            return _AccumulatingLinear.apply(args[0], weight, bias, _anchor(weight) if self.sums else None, self)
        with standing_in(self.module, self.taps()):
            return self.original(*args, **kwargs)

    def taps(self) -> dict[str, torch.Tensor]:
        """Stand-ins for the scored parameters, by attribute, for whoever reads them."""
        found = {}
        for attribute, total in self.sums.items():
            parameter = self.module._parameters[attribute]
            assert parameter is not None
            found[attribute] = Tap.apply(parameter, _anchor(parameter), self._discarding(total))
        return found

    def _discarding(self, total: Accumulator) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(grad: torch.Tensor) -> torch.Tensor:
            if self.rule.of_example is not None:
                self.examples.mixed.add(total.name)  # a dense gradient is that of all examples
                return grad.new_zeros(0)
            total.add(grad)
            total.end()
            return grad.new_zeros(0)

        return add

    def remove(self) -> None:
        """Give the forward back."""
        if self.had_own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.had_own


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer (transformers.pytorch_utils.Conv1D), which keeps its weight as [I, O]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_batched(model: nn.Module, names: Sequence[str]) -> dict[str, bool]:
    """Which parameters allow scores per example from one batch: weights and biases of plain Linear and Conv1D modules."""
    parameters, owners = base_parameters(model), owners_of(model)
    found = {}
    for name in names:
        scorers = [_Scorer(m, {}, Rule(), Examples()) for m, _ in owners[id(parameters[name])]]
        found[name] = len(scorers) == 1 and scorers[0].is_fast  # a tied weight's two gradients add up before the rule
    return found


def _anchor(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(0, dtype=parameter.dtype, device=parameter.device, requires_grad=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[Recompute]:
    """No parameter requires grad while open and dropout is off; an attached tuner's forwards are out of the way. A partitioned
    weight is whole while its own layer computes; yields the context for a layer's second forward.

    The weights then hold base + values, so what is scored is the model as it has become.
    """
    tuner = getattr(model, "_speft_tuner", None)
    if tuner is not None:
        tuner.sync()
        tuner.outside.remove()
    required = {p: p.requires_grad for p in model.parameters()}
    training = {m: m.training for m in model.modules()}
    attached = {m: f for m in model.modules() if isinstance(f := m.__dict__.get("forward"), AttachedForward)}
    try:
        for forward in attached.values():
            forward.remove()
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        with gathering(model) as recompute:
            yield recompute
    finally:
        for forward in attached.values():
            forward.install()
        if tuner is not None:
            tuner.outside.install()
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)
        for module, was in training.items():
            module.training = was


@contextmanager
def accumulating(
    model: nn.Module, sums: Mapping[str, Accumulator], rule: Rule, all_names: Sequence[str] = ()
) -> Iterator[Examples]:
    """While open, every backward through `model` adds to the accumulators, name -> Accumulator, by the `rule`.

    all_names: targets that belong to the same scores but have no accumulator in this pass; their modules compute just as in
    a pass where they have one, so that splitting targets over passes changes no bit. Yields the Examples to fill in for
    each batch when the rule looks at single examples.
    """
    parameters, owners = base_parameters(model), owners_of(model)
    by_module: dict[nn.Module, dict[str, Accumulator]] = {}
    for name in dict.fromkeys((*all_names, *sums)):
        for module, attribute in owners[id(parameters[name])]:
            attributes = by_module.setdefault(module, {})
            if name in sums:
                attributes[attribute] = sums[name]
    examples = Examples()
    scorers = [_Scorer(module, attributes, rule, examples) for module, attributes in by_module.items()]
    stack = ExitStack()
    try:
        for scorer in scorers:
            if not any(is_partitioned(p) for p in scorer.module._parameters.values() if p is not None):
                with torch.enable_grad():
                    taps = scorer.taps()
                stack.enter_context(standing_in(scorer.module, taps))  # for modules that read another one's parameters
            scorer.module.forward = scorer
        yield examples
    finally:
        stack.close()
        for scorer in scorers:
            if scorer.module.__dict__.get("forward") is scorer:
                scorer.remove()
