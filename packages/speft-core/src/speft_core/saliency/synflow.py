"""SynFlow without data: how much each weight carries of a flow of ones through the network of absolute weights.

R = 1ᵀ(∏|θ⁽ˡ⁾|)1 (Tanaka et al., arXiv 2006.05467; SPEFT, table 1) for a transformer:
- every parameter of the model is replaced by its absolute value;
- the input is one all-ones embedding, a sequence of length one, so that no mask, rotation or averaging over tokens enters;
- activations and softmax are the identity, so attention multiplies v by the scaled product of q and k;
- a norm divides by its root mean square taken as a constant, without centring, then applies |weight| and |bias|: the division
  keeps deep networks from overflowing, and as a constant it leaves the flow linear along each path.
R is the sum of the model's output (its logits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .accumulate import Rule, accumulating, frozen
from .passes import Pass, Statistics

_NAMES = (
    "relu relu6 relu_ gelu silu mish elu selu celu leaky_relu hardswish hardtanh softplus softsign tanh tanhshrink sigmoid "
    "hardsigmoid logsigmoid dropout softmax log_softmax"
).split()
IDENTITIES = {getattr(owner, n) for owner in (functional, torch, torch.Tensor) for n in _NAMES if hasattr(owner, n)}
ACTIVATION_FILES = ("torch.nn.modules.activation", "transformers.activations")


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float | None = None, enable_gqa: bool = False,
    **__: Any,
) -> torch.Tensor:  # fmt: skip
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    return (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale) @ value


def _norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float | None = 1e-5,
) -> torch.Tensor:
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _norm(x, shape, weight, None, eps)


REPLACED: dict[Any, Callable[..., torch.Tensor]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.layer_norm: _norm,
    torch.layer_norm: _norm,
    functional.rms_norm: _rms_norm,
    torch.rsqrt: lambda x: torch.rsqrt(x.detach()),
    torch.Tensor.rsqrt: lambda x: torch.rsqrt(x.detach()),
}


class _Linearised(TorchFunctionMode):
    """Every activation is the identity, every norm a division by a constant, attention a plain product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IDENTITIES:
            return args[0] if args else kwargs["input"]
        if func is functional.multi_head_attention_forward:
            raise UserError("synflow cannot look into torch.nn.MultiheadAttention; choose another metric")
        return REPLACED.get(func, func)(*args, **kwargs)


@contextmanager
def _absolute(model: nn.Module) -> Iterator[None]:
    """Weights are |θ| and activation modules the identity while open; restored from copies, also after an exception."""
    saved = {p: p.detach().to("cpu", copy=True) for p in model.parameters()}
    activations = [
        m for m in model.modules()
        if type(m).__module__ in ACTIVATION_FILES and not any(True for _ in m.parameters()) and "forward" not in m.__dict__
    ]  # fmt: skip
    try:
        for parameter in saved:
            parameter.data.abs_()
        for module in activations:
            module.forward = lambda x, *_, **__: x
        yield
    finally:
        for module in activations:
            module.__dict__.pop("forward", None)
        for parameter, before in saved.items():
            parameter.data.copy_(before)


def _flow(run: Pass) -> torch.Tensor:
    """R, the sum of what the model gives for one all-ones embedding."""
    model = run.model
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise UserError("synflow needs a model with get_input_embeddings() that accepts inputs_embeds; choose another metric")
    weight = embeddings.weight
    ones = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    output = model(inputs_embeds=ones)
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())))
    return (output if isinstance(output, torch.Tensor) else output[0]).sum()


def synaptic_flow(run: Pass, names: Sequence[str]) -> Statistics:
    """∂R/∂|θ|: name -> tensor in the parameter's shape. Every weight keeps its bits, also when the model raises."""
    sums = run.accumulators(names)
    with frozen(run.model), _absolute(run.model), accumulating(run.model, sums, Rule(), run.all_names), torch.enable_grad():
        with _Linearised():
            flow = _flow(run)
        if not bool(torch.isfinite(flow)):
            raise UserError(f"synflow: the flow of ones is {flow.item()} in {flow.dtype}; load the model in fp32")
        flow.backward()
    return {n: s.sum for n, s in sums.items()}
