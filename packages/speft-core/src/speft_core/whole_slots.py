"""A parameter of 16 bits that is trained whole, such as a new head: its values are the parameter itself in fp32.

An optimizer of bf16 weights loses every update below half of their last bit, and Adam's second moment, which falls by a
thousandth a step, never falls. So the optimizer gets an fp32 Parameter, as it does of masked scalars. In training the values,
rounded by an operator of PyTorch's own, stand in for the weight, which is given the same bits for whoever reads it elsewhere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .ops.compiled import enroll
from .ops.recipes import sharded
from .partitioned import is_absent
from .slots import Slot
from .targets import WHOLE
from .together import Together

SHORT = (torch.bfloat16, torch.float16)


class WholeSlot(Slot):
    """A Slot of all entries: `<param>_values` has the parameter's shape and is its value, not a change of it."""

    def __init__(self, name: str, module: nn.Module, attribute: str, together: Together) -> None:
        weight: nn.Parameter = getattr(module, attribute)
        self.name, self.module, self.attribute, self.own = name, module, attribute, weight
        self.together, self.work, self.reason = together, None, "trained whole"
        self.stale, self._seen = True, (-1, -1)
        self.key = enroll(self)
        module.register_parameter(f"{attribute}_values", nn.Parameter(weight.detach().float()))
        module.__dict__.setdefault(WHOLE, set()).add(attribute)

    def write(self) -> None:
        """Make the weight hold the values. In training that is left to `tap`."""
        if not (torch.is_grad_enabled() and self.values_K.requires_grad):
            super().write()

    def rewrite(self) -> None:
        """Round the values into the weight."""
        if not is_absent(self.weight) and not self.is_lent:
            with torch.no_grad():
                self.weight.data.copy_(self.values_K)

    def summed(self) -> torch.Tensor:
        """The values in the weight's dtype, differentiable."""
        return self.values_K.to(self.weight.dtype)

    def tap(self, read: set[Slot] | None = None) -> torch.Tensor:
        """The values in the weight's dtype, which the weight holds too from now on; a lent tensor stands for itself."""
        weight = self.weight
        if self.is_lent:
            return weight
        self.stale, tap = True, self.summed()
        if not sharded(weight):  # else none but its module's forward sees it
            weight.data.copy_(tap.detach())
        if tap.requires_grad and (read is not None or self.together.asks):
            tap.register_hook(partial(self._came, read))
        return tap

    def _came(self, read: set[Slot] | None, _grad: torch.Tensor) -> None:
        self.together.over()
        if read is not None:
            read.add(self)

    def loaded(self, weight_was_loaded: bool) -> None:
        """After load_state_dict: the values are what was loaded."""
        if weight_was_loaded:
            self.values_K.data.copy_(self.weight)
        self.stale = True

    def remove(self) -> None:
        """Take the values off the module; the weight is the caller's to restore."""
        del self.module._parameters[f"{self.attribute}_values"]
        marked = self.module.__dict__[WHOLE]
        marked.discard(self.attribute)
        if not marked:
            del self.module.__dict__[WHOLE]
