"""One adapted parameter on the module that owns it, and the module's forward that serves it.

A slot's tensors live on the module: `<param>_values` (a Parameter, hidden from state_dict), `<param>_indices` and `<param>_base`
(non-persistent buffers), so that they follow `.to()`, DDP, the Trainer and DeepSpeed as any other.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError
from .ops.compiled import enroll
from .ops.functions import SparseLinear, Tap, Work
from .ops.keep import Keeper
from .ops.layout import Layout
from .ops.plans import Plan, plan_named
from .ops.recipes import hooks_forbid, recipe_of, sharded
from .partitioned import is_absent, is_partitioned
from .standing import recomputed, standing_in, traced_in
from .together import Together
from .writing import Sum, gather, scatter

if TYPE_CHECKING:
    from .remask import Parked


def check_adaptable(name: str, weight: torch.Tensor) -> None:
    """Raise UserError unless `weight` is a contiguous floating-point tensor, the only kind that is written in place."""
    if not weight.is_contiguous() or not weight.is_floating_point():
        got = f"{weight.dtype}{'' if weight.is_contiguous() else ', not contiguous'}"
        raise UserError(f"{name}: only contiguous floating-point parameters can be adapted, got {got}")


class Slot:
    """An adapted parameter: where it lives, its plan, and whether the weight holds base + values at the moment.

    `stale` starts true and is set by every forward that may be followed by an update, since optimizers and engines such as
    DeepSpeed write `values` without leaving a trace in its version counter. together: the slots it is written with.
    """

    def __init__(
        self, name: str, module: nn.Module, attribute: str, indices_K: torch.Tensor, backward: str,
        keep_dtype: torch.dtype | None = None, together: Together | None = None,
    ) -> None:
        weight: nn.Parameter = getattr(module, attribute)
        self.name, self.module, self.attribute, self.own = name, module, attribute, weight
        self._backward, self._keep_dtype = backward, keep_dtype
        self.together = together or Together()
        self.reason = "dense gradient of this tensor alone"
        self.work: Work | None = None
        if self.is_fast:
            self._choose(indices_K.to(weight.device), weight)
        self.stale, self._seen, self._sum = True, (-1, -1), Sum()
        self.key = enroll(self)
        values_K = nn.Parameter(torch.zeros(indices_K.numel(), dtype=torch.float32, device=weight.device))
        if weight.dtype == torch.float64:
            values_K = nn.Parameter(values_K.data.double())
        indices_K = indices_K.to(weight.device)
        base_K = gather(weight, indices_K)
        # Nothing is put onto the module before all of it is there: memory may run out.
        module.register_parameter(f"{attribute}_values", values_K)
        module.register_buffer(f"{attribute}_indices", indices_K, persistent=False)
        module.register_buffer(f"{attribute}_base", base_K, persistent=False)

    def _choose(self, indices_K: torch.Tensor, weight: torch.Tensor) -> None:
        layout = Layout.of(indices_K, (weight.shape[0], weight.shape[1]))
        plan, self.reason = plan_named(self._backward, layout, weight)
        self.work = Work(plan, layout, Keeper(layout.cols_C, self._keep_dtype), self.together.over)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = enroll(self)  # a copy is another one to compiled graphs

    @property
    def plan(self) -> Plan | None:
        """The backward plan of a plain Linear's weight."""
        return self.work.plan if self.work is not None else None

    @property
    def layout(self) -> Layout | None:
        """Where the entries of a plain Linear's weight lie."""
        return self.work.layout if self.work is not None else None

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

    @property
    def is_lent(self) -> bool:
        """Whether a tensor of the caller's stands in for the parameter (torch.func.functional_call), which is not ours to write.

        FSDP lends its own, a view of the flat parameter, which holds the base and is to be written.
        """
        return type(self.weight) is torch.Tensor and not hasattr(self.own, "_fsdp_flattened")

    def write(self) -> None:
        """Make the weight hold base + values; skipped when a forward without gradients finds nothing changed."""
        if is_absent(self.weight) or self.is_lent:  # its next forward gathers and writes
            return
        values_K = self.values_K
        if torch.is_grad_enabled() and values_K.requires_grad:
            self.stale = True
            if not self.together.covers(self):
                self.rewrite()
            return
        seen = (values_K.data_ptr(), values_K._version)
        if self.stale or seen != self._seen or sharded(self.weight):
            self.rewrite()
        self.stale, self._seen = False, seen

    def rewrite(self) -> None:
        """Write base + values in any case: into a weight that was gathered anew from shards, which hold the base alone."""
        if not is_absent(self.weight) and not self.is_lent:
            self._sum.write(self.weight, self.indices_K, self.base_K, self.values_K)

    def summed(self) -> torch.Tensor:
        """A copy of the parameter with base + values in it, differentiable by values; for graphs, which do not see `write`."""
        sum_K = (self.base_K.to(self.values_K.dtype) + self.values_K).to(self.base_K.dtype)
        flat = self.weight.detach().reshape(-1)
        return flat.index_put((self.indices_K.long(),), sum_K).view(self.weight.shape)

    def tap(self, read: set[Slot] | None = None) -> torch.Tensor:
        """What stands in for the parameter in training and gives the values their gradient. read: gets this slot when one comes."""
        pick = self._pick if read is None else functools.partial(self._pick, read=read)
        return Tap.apply(self.weight, self.values_K, pick)

    def _pick(self, grad: torch.Tensor, read: set[Slot] | None = None) -> torch.Tensor:
        """The kept entries of this parameter's dense gradient, in the values' dtype."""
        self.together.over()
        if read is not None:
            read.add(self)
        return grad.reshape(-1).index_select(0, self.indices_K).to(self.values_K.dtype)

    def work_on(self, device: torch.device) -> Work:
        """What backward does, its layout moved along when the model was."""
        assert self.work is not None
        if self.work.layout.rows_R.device != device:
            self.work = replace(self.work, layout=self.work.layout.to(device))
        return self.work

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
        if self.work is not None:
            self._choose(indices_K, weight)
            self.key = enroll(self)  # compiled graphs hold the old layout's sizes
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
    """Replaces `module.forward` while attached; hooks, name and class of the module stay. Calls the original for all but plain Linear.

    Hides values from the module's state_dict, and takes up weights that are loaded. A deep copy of the module has its own, so
    hooks are methods and not closures.
    """

    def __init__(self, module: nn.Module, slots: list[Slot], parked: dict[str, Parked]) -> None:
        self.module, self.slots, self._parked = module, slots, parked
        self.called = False  # in training
        self.fast = next((s for s in slots if s.work is not None), None)
        self.bias = next((s for s in slots if s.attribute == "bias"), None)
        self.had_own = module.__dict__.get("forward")  # set on the instance by someone before us, put back on removal
        self.original = module.forward
        self._hooks: list[Any] = []
        self._loaded: list[str] = []  # attributes of the slots whose weights the state being loaded has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        for slot in self.slots:
            slot.write()
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        self.called, fast = True, self.fast
        if fast is None or len(args) != 1 or kwargs:
            with standing_in(self.module, self._taps() | recomputed(self.module, self._again)):
                return self.original(*args, **kwargs)
        (x,), weight = args, fast.weight
        bias: torch.Tensor | None = self.module._parameters["bias"]
        if self.bias is not None:
            bias = self.bias.tap()
        if sharded(weight):  # or lent, and then not written, in backward neither
            return SparseLinear.apply(x, weight, bias, fast.values_K, fast.work_on(x.device), None, fast.rewrite)
        recipe = None if hooks_forbid() else recipe_of(x)
        return SparseLinear.apply(x, weight, bias, fast.values_K, fast.work_on(x.device), recipe)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same in operators that torch.compile can trace: one for a Linear, an out-of-place sum for any other tensor."""
        fast = self.fast
        taps = {s.attribute: s.summed() for s in self.slots if s is not fast and not s.is_lent}
        if fast is not None and len(args) == 1 and not kwargs:
            x, weight, bias = args[0], fast.weight, taps.get("bias", self.module._parameters["bias"])
            if torch.is_autocast_enabled(x.device.type):
                low = torch.get_autocast_dtype(x.device.type)
                x, bias = x.to(low), None if bias is None else bias.to(low)  # the operator casts the weight, once written
            return torch.ops.speft.linear(x, weight, bias, fast.values_K, fast.key, torch.is_grad_enabled())[0]
        if fast is not None and not fast.is_lent:
            taps[fast.attribute] = fast.summed()
        with traced_in(self.module, taps):
            return self.original(*args, **kwargs)

    def _taps(self) -> dict[str, Any]:
        return {s.attribute: s.tap() for s in self.slots}

    def _again(self) -> AbstractContextManager[None]:
        """For a layer that computes again in backward, where `__call__` does not come by: taps that stand in there."""
        if not torch.is_grad_enabled():
            return nullcontext()
        for slot in self.slots:
            if sharded(slot.weight):  # gathered anew, without the values
                slot.rewrite()
        return standing_in(self.module, self._taps())

    def install(self) -> None:
        """Take the forward's place."""
        self.module.forward = self
        self._hooks = [
            self.module.register_state_dict_pre_hook(self._before_saving),
            self.module.register_state_dict_post_hook(functools.partial(AttachedForward._hide, self)),  # torch marks it: no method
            self.module.register_load_state_dict_pre_hook(self._before_load),
            self.module.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Give it back."""
        for hook in self._hooks:
            hook.remove()
        if self.had_own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.had_own

    def _before_saving(self, *_: Any) -> None:
        for slot in self.slots:
            if is_partitioned(slot.own) or not sharded(slot.weight):  # else FSDP holds parts, to which the indices do not fit
                slot.rewrite()  # the optimizer has stepped since the last forward

    def _hide(self, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for slot in self.slots:
            state.pop(f"{prefix}{slot.attribute}_values", None)

    def _before_load(self, _module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        self._loaded = [s.attribute for s in self.slots if prefix + s.attribute in state]

    def _after_load(self, _module: nn.Module, incompatible: Any) -> None:
        hidden, missing = {f"{s.attribute}_values" for s in self.slots}, incompatible.missing_keys
        missing[:] = [k for k in missing if k.rpartition(".")[2] not in hidden]
        for slot in self.slots:
            slot.loaded(slot.attribute in self._loaded)
            if slot.attribute in self._loaded and slot.name in self._parked:
                self._parked[slot.name] = self._parked[slot.name].loaded_from(slot.weight)
