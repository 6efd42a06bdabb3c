"""An input need not be kept when autograd keeps what it was made of: a product of two tensors, or a saved output.

A gated MLP's `silu(gate) * up`, an RMSNorm's `weight * (hidden * rsqrt)` and the output of scaled dot-product attention are
of this kind: their own backward saves the factors, so a linear layer that reads them can form the few columns it needs when
backward comes by, with the very same operations and so the same bits. The nodes are only looked at in forward; what they
saved is read in backward, as hooks for saved tensors (offloading, measuring) may then have moved it. The one thing read in
forward is whether a frozen factor is a plain number.

Where this is not safe, `recipe_of` gives None and the columns are kept: under checkpointing (whose saved tensors can be read
only once) and any other hook of a library, and for sharded weights, which may be gone when backward comes.

A change in place without grad leaves the nodes as they were. What a node saved autograd checks itself, and the input its version
tells. Of the product within `weight * (a * b)` nothing is left to ask: a module that changes it in place before it multiplies by
its weight gets a wrong gradient.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .layout import Layout

_ATTENTION = tuple(
    f"ScaledDotProduct{kind}AttentionBackward0" for kind in ("Flash", "Efficient", "Cudnn", "FusedOverrideable")
) + ("ScaledDotProductFlashAttentionForCpuBackward0",)
_ACTIVATIONS = ("ReluBackward0", "TanhBackward0", "SigmoidBackward0")
SAVED_OUTPUT = dict.fromkeys(_ATTENTION, "_saved_output") | dict.fromkeys(_ACTIVATIONS, "_saved_result")
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0")
_last = threading.local()  # the input seen last, and its recipe
_LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "fairscale")


@dataclass(eq=False)
class Recipe:
    """How to read the factors of an input of `shape` from nodes of the graph; `steps`: (read, dtype of the product so far)."""

    shape: torch.Size
    steps: list[tuple[Callable[[], torch.Tensor], torch.dtype]] = field(default_factory=list)
    readers: int = 0  #: layers whose backward is still to come
    shared: list[Layout] = field(default_factory=list)  #: of the layers whose plan can share what it makes of the input
    words: list[int] = field(default_factory=list)  #: the factors as native.c reads them, if it was asked
    _read: list[tuple[torch.Tensor, torch.dtype]] = field(default_factory=list)

    def factors(self) -> list[tuple[torch.Tensor, torch.dtype]]:
        """Each factor as it was saved, of a shape that expands to this one, and the dtype that the product is rounded to after it.

        To be called in backward. They are read once for all readers, and held until the last has come.
        """
        self.readers -= 1
        if not self._read:
            self._read, self.words = self._factors(), []
        found = self._read
        if self.readers <= 0:
            self._read = []
        return list(found)

    def _factors(self) -> list[tuple[torch.Tensor, torch.dtype]]:
        found, with_graph = [], torch.is_grad_enabled()  # plain code: read for hundreds of layers a step, with cold caches
        for read, dtype in self.steps:
            factor = read()
            if with_graph:
                factor = factor.detach()
            found.append((factor if factor.is_floating_point() else factor.to(dtype), dtype))
        return found


def as_rows(factor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[T, I]: a factor expanded to the input's `shape`, as a view where its strides allow one."""
    return (factor if factor.shape == shape else factor.expand(shape)).reshape(-1, shape[-1])


def hooks_forbid() -> bool:
    """Whether saved tensors go through a library's hooks at the moment."""
    try:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    except (AttributeError, TypeError):  # another PyTorch: be careful
        return True
    if hooks is None:
        return False
    module = getattr(hooks[0], "__module__", None)  # None of a builtin function
    return str(module).split(".")[0] in _LIBRARIES


def sharded(weight: torch.Tensor) -> bool:
    """Whether the model's weights may be somewhere else when backward comes (ZeRO-3, FSDP, DTensor)."""
    marks = weight.__dict__  # asked at every forward, where a failing hasattr costs as much as all else
    return "ds_id" in marks or "_fsdp_flattened" in marks or type(weight) is not torch.nn.Parameter


def recipe_of(x: torch.Tensor) -> Recipe | None:
    """How to make `x` again from what autograd saves for others, or None when it saves no such thing.

    All layers that read one x get the same recipe.
    """
    node = x.grad_fn
    if node is None or x.dim() == 0 or x._version:  # changed in place, perhaps without grad, of which the nodes tell nothing
        return None
    last: tuple[weakref.ref[torch.Tensor], weakref.ref[Recipe]] | None = getattr(_last, "made", None)
    made = last[1]() if last is not None and last[0]() is x else None
    if made is None:
        made = _product(node, x) or _saved_output(node, x)
        if made is not None:
            _last.made = (weakref.ref(x), weakref.ref(made))  # a layer that needs it holds it
    return made


def _reader(node: Any, attribute: str) -> Callable[[], torch.Tensor]:
    return lambda: getattr(node, attribute)


def _operands(node: Any) -> list[Any]:
    return [entry[0] for entry in node.next_functions]


def _both(node: Any, dtype: torch.dtype) -> list[tuple[Callable[[], torch.Tensor], torch.dtype]]:
    wide = torch.promote_types(dtype, torch.float32)
    return [(_reader(node, "_saved_self"), wide), (_reader(node, "_saved_other"), dtype)]


def _product(node: Any, x: torch.Tensor) -> Recipe | None:
    """x = a * b, or x = w * (a * b) with w frozen and possibly a change of dtype between."""
    if type(node).__name__ != "MulBackward0":
        return None
    operands = _operands(node)
    if None not in operands:
        return Recipe(x.shape, _both(node, x.dtype))
    place = 0 if operands[0] is not None else 1
    inner, dtype = operands[place], None
    if type(inner).__name__ == "ToCopyBackward0":  # one alone: of two, the first may have rounded more than the second
        (made,) = inner._input_metadata
        dtype, inner = made.dtype, _operands(inner)[0]
    if type(inner).__name__ != "MulBackward0" or None in _operands(inner) or dtype not in (None, x.dtype, torch.float32):
        return None
    frozen = _reader(node, "_saved_other" if place == 0 else "_saved_self")
    if frozen().dim() == 0:  # a plain number: float64 and on the CPU, whatever the model is
        return None
    (made,) = inner._input_metadata
    if tuple(made.shape) != tuple(x.shape) or made.device != x.device:
        return None
    return Recipe(x.shape, [*_both(inner, dtype or made.dtype), (frozen, x.dtype)])


def _before_reshapes(node: Any, output: int) -> tuple[Any, int, int]:
    """The node before reshapes and copies, which of its outputs they take, and the number of copies."""
    copies = 0
    while (name := type(node).__name__) in _RESHAPES:
        copies += name == "CloneBackward0"
        node, output = node.next_functions[0]
    return node, output, copies


def _saved_output(node: Any, x: torch.Tensor) -> Recipe | None:
    """x is the saved output of a node, perhaps transposed and then reshaped."""
    node, output, copies = _before_reshapes(node, 0)
    if output != 0:
        return None
    swap: tuple[int, int] | None = None
    before: tuple[int, ...] = tuple(x.shape)
    if type(node).__name__ == "TransposeBackward0":
        swap = (node._saved_dim0, node._saved_dim1)
        node, output = node.next_functions[0]
        before = tuple(node._input_metadata[output].shape)
        node, output, more = _before_reshapes(node, output)
        copies += more
        if output != 0:
            return None
    attribute = SAVED_OUTPUT.get(type(node).__name__)
    if attribute is None or copies > 1:  # between two copies lies a tensor whose version can no longer be seen
        return None
    made = node._input_metadata[0]
    if made.dtype != x.dtype or math.prod(made.shape) != x.numel():
        return None
    source, shape = _reader(node, attribute), x.shape

    def read() -> torch.Tensor:
        found = source().reshape(before)
        if swap is not None:
            rank = found.dim()  # autograd keeps dimensions as unsigned numbers
            found = found.transpose(*(d if d < rank else d - 2**64 for d in swap))
        return found.reshape(shape)

    return Recipe(shape, [(read, x.dtype)])
