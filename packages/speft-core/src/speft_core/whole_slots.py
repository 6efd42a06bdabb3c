"""A parameter of 16 bits that is trained whole, such as a new head: its values are the parameter itself in fp32.

An optimizer of bf16 weights loses every update below half of their last bit, and Adam's second moment, which falls by a
thousandth a step, never falls. So the optimizer gets an fp32 Parameter, as it does of masked scalars, and each forward
finds it rounded in the weight.
"""

from __future__ import annotations

import torch
from torch import nn

from .ops.compiled import enroll
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

    def rewrite(self) -> None:
        """Round the values into the weight."""
        if not is_absent(self.weight) and not self.is_lent:
            with torch.no_grad():
                self.weight.data.copy_(self.values_K)

    def summed(self) -> torch.Tensor:
        """The values in the weight's dtype, differentiable."""
        return self.values_K.to(self.weight.dtype)

    def pick(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient in fp32."""
        self.together.over()
        return grad.to(self.values_K.dtype)

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
