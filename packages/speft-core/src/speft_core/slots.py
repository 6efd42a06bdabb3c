"""One adapted parameter on the module that owns it, and the module's forward that serves it.

A slot's tensors live on the module: `<param>_values` (a Parameter, hidden from state_dict), `<param>_indices` and `<param>_base`
(non-persistent buffers), so that they follow `.to()`, DDP, the Trainer and DeepSpeed as any other.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import UserError
from .ops.compiled import enroll
from .ops.functions import SparseLinear, Tap
from .ops.keep import Keeper
from .ops.layout import Layout
from .ops.plans import Plan, plan_named
from .ops.recipes import hooks_forbid, recipe_of, sharded
from .partitioned import is_absent, is_partitioned
from .writing import Sum, gather, scatter


def check_adaptable(name: str, weight: torch.Tensor) -> None:
    """Raise UserError unless `weight` is a contiguous floating-point tensor, the only kind that is written in place."""
    if not weight.is_contiguous() or not weight.is_floating_point():
        got = f"{weight.dtype}{'' if weight.is_contiguous() else ', not contiguous'}"
        raise UserError(f"{name}: only contiguous floating-point parameters can be adapted, got {got}")


class Slot:
    """An adapted parameter: where it lives, its plan, and whether the weight holds base + values at the moment.

    `stale` starts true and is set by every forward that may be followed by an update, since optimizers and engines such as
    DeepSpeed write `values` without leaving a trace in its version counter.
    """

    def __init__(
        self, name: str, module: nn.Module, attribute: str, indices_K: torch.Tensor, backward: str,
        keep_dtype: torch.dtype | None = None,
    ) -> None:
        weight: nn.Parameter = getattr(module, attribute)
        self.name, self.module, self.attribute = name, module, attribute
        self._backward, self._keep_dtype = backward, keep_dtype
        self.plan: Plan | None = None
        self.reason = "dense gradient of this tensor alone"
        self.layout: Layout | None = None
        self.keeper: Keeper | None = None
        if self.is_fast:
            self.layout = Layout.of(indices_K.to(weight.device), (weight.shape[0], weight.shape[1]))
            self.plan, self.reason = plan_named(backward, self.layout, weight)
            self.keeper = Keeper(self.layout.cols_C, keep_dtype)
        self.stale, self._seen, self._sum = True, (-1, -1), Sum()
        self.number = enroll(self)
        values_K = nn.Parameter(torch.zeros(indices_K.numel(), dtype=torch.float32, device=weight.device))
        if weight.dtype == torch.float64:
            values_K = nn.Parameter(values_K.data.double())
        values_K.is_speft_values = True  # type: ignore[attr-defined]
        indices_K = indices_K.to(weight.device)
        module.register_parameter(f"{attribute}_values", values_K)
        module.register_buffer(f"{attribute}_indices", indices_K, persistent=False)
        module.register_buffer(f"{attribute}_base", gather(weight, indices_K), persistent=False)

    @property
    def is_fast(self) -> bool:
        """Whether this is the weight of a plain Linear, whose forward is known and whose plans apply."""
        plain = type(self.module) is nn.Linear and "forward" not in vars(self.module)
        return plain and self.attribute == "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The frozen parameter, which holds base + values."""
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def values_K(self) -> nn.Parameter:
        """The trainable change."""
        return self.module._parameters[f"{self.attribute}_values"]  # type: ignore[return-value]

    @property
    def indices_K(self) -> torch.Tensor:
        """Flat indices of the kept entries."""
        return self.module._buffers[f"{self.attribute}_indices"]  # type: ignore[return-value]

    @property
    def base_K(self) -> torch.Tensor:
        """The base's entries, bit for bit."""
        return self.module._buffers[f"{self.attribute}_base"]  # type: ignore[return-value]

    def write(self) -> None:
        """Make the weight hold base + values; skipped when a forward without gradients finds nothing changed."""
        if is_absent(self.weight):  # its next forward gathers and writes
            return
        values_K = self.values_K
        training = torch.is_grad_enabled() and values_K.requires_grad
        seen = (values_K.data_ptr(), values_K._version)
        if training or self.stale or seen != self._seen or sharded(self.weight):
            self.rewrite()
        self.stale, self._seen = training, seen

    @torch.no_grad()
    def rewrite(self) -> None:
        """Write base + values in any case: into a weight that was gathered anew from shards, which hold the base alone."""
        self._sum.write(self.weight, self.indices_K, self.base_K, self.values_K)

    def summed(self) -> torch.Tensor:
        """A copy of the parameter with base + values in it, differentiable by values; for graphs, which do not see `write`."""
        sum_K = (self.base_K.to(self.values_K.dtype) + self.values_K).to(self.base_K.dtype)
        flat = self.weight.detach().reshape(-1)
        return flat.index_put((self.indices_K.long(),), sum_K).view(self.weight.shape)

    def pick(self, grad: torch.Tensor) -> torch.Tensor:
        """The kept entries of this parameter's dense gradient, in the values' dtype."""
        return grad.reshape(-1).index_select(0, self.indices_K).to(self.values_K.dtype)

    def layout_on(self, device: torch.device) -> Layout:
        """The layout, moved along when the model was."""
        assert self.layout is not None
        if self.layout.rows_R.device != device:
            self.layout = self.layout.to(device)
        return self.layout

    def loaded(self, weight_was_loaded: bool) -> None:
        """After load_state_dict: the loaded weight is base + values, so values follow from it; the weight keeps its bits."""
        if weight_was_loaded:
            wide_K = gather(self.weight, self.indices_K).to(self.values_K.dtype)
            self.values_K.data.copy_(wide_K - self.base_K.to(wide_K.dtype))
        self.stale = True

    def reindex(self, indices_K: torch.Tensor) -> None:
        """Adapt other entries of the parameter, which must hold the base's bits now; values are the caller's to set (remask.py)."""
        weight = self.weight
        indices_K = indices_K.to(weight.device)
        if self.layout is not None:
            self.layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
            self.plan, self.reason = plan_named(self._backward, self.layout, weight)
            self.number = enroll(self)  # compiled graphs hold the old layout's sizes
            self.keeper = Keeper(self.layout.cols_C, self._keep_dtype)
        self.module._buffers[f"{self.attribute}_indices"] = indices_K
        self.module._buffers[f"{self.attribute}_base"] = gather(weight, indices_K)
        self.stale = True

    def remove(self) -> None:
        """Restore the base's bits, which shards never lost, and take everything off the module again."""
        if not is_partitioned(self.weight):
            scatter(self.weight, self.indices_K, self.base_K)
        del self.module._parameters[f"{self.attribute}_values"]
        for kind in ("indices", "base"):
            del self.module._buffers[f"{self.attribute}_{kind}"]
            self.module._non_persistent_buffers_set.discard(f"{self.attribute}_{kind}")


class AttachedForward:
    """Replaces `module.forward` while attached; hooks, name and class of the module stay. Calls the original for all but plain Linear."""

    def __init__(self, module: nn.Module, slots: list[Slot]) -> None:
        self.module, self.slots = module, slots
        self.had_own = module.__dict__.get("forward")  # set on the instance by someone before us, put back on removal
        self.original = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        for slot in self.slots:
            slot.write()
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        taps = {s.attribute: Tap.apply(s.weight, s.values_K, s.pick) for s in self.slots if s.plan is None}
        fast = next((s for s in self.slots if s.plan is not None), None)
        if fast is not None and len(args) == 1 and not kwargs:
            bias = taps.get("bias", self.module.bias)
            x = args[0]
            weight = fast.weight
            is_sharded = sharded(weight)
            recipe = None if hooks_forbid() or is_sharded else recipe_of(x)
            layout, rewrite = fast.layout_on(x.device), fast.rewrite if is_sharded else None
            return SparseLinear.apply(x, weight, bias, fast.values_K, fast.plan, layout, recipe, fast.keeper, rewrite)
        if fast is not None:
            taps[fast.attribute] = Tap.apply(fast.weight, fast.values_K, fast.pick)
        return self._with(taps, args, kwargs)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same in operators that torch.compile can trace: one for a Linear, an out-of-place sum for any other tensor."""
        taps = {s.attribute: s.summed() for s in self.slots if s.plan is None}
        fast = next((s for s in self.slots if s.plan is not None), None)
        if fast is not None and len(args) == 1 and not kwargs:
            x, weight, bias = args[0], fast.weight, taps.get("bias", self.module.bias)
            if torch.is_autocast_enabled(x.device.type):
                low = torch.get_autocast_dtype(x.device.type)
                x, bias = x.to(low), None if bias is None else bias.to(low)  # the operator casts the weight, once written
            return torch.ops.speft.linear(x, weight, bias, fast.values_K, fast.number, torch.is_grad_enabled())[0]
        if fast is not None:
            taps[fast.attribute] = fast.summed()
        return self._with(taps, args, kwargs)

    def _with(self, taps: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original forward with the taps in the place of their parameters; an instance attribute hides a parameter."""
        instance = self.module.__dict__
        try:
            instance.update(taps)
            return self.original(*args, **kwargs)
        finally:
            for attribute in taps:
                instance.pop(attribute, None)

    def install(self) -> None:
        """Take the forward's place."""
        self.module.forward = self

    def remove(self) -> None:
        """Give it back."""
        if self.had_own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.had_own
