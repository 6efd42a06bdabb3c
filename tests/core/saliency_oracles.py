"""Independent dense oracles in float64: each formula of the table by the plainest means, one example at a time where told.

Nothing here uses speft_core. `datasets()` gives batches of unequal size and length; oracles see the examples one by one, with
their padding cut off, so that a batch's padding cannot count.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import pico

Batch = dict[str, torch.Tensor]


def dataset(model: nn.Module) -> list[Batch]:
    """Three batches of 3, 2 and 1 examples, 9, 7 and 5 long; each batch's last example is padded, prompts carry no label."""
    batches = [
        pico.batch(model, rows=rows, length=length, seed=seed) for seed, (rows, length) in enumerate([(3, 9), (2, 7), (1, 5)])
    ]
    for batch in batches:
        if batch["labels"].dim() == 2:
            batch["labels"][:, :2] = -100
    return batches


def singles(batches: list[Batch]) -> list[Batch]:
    """Every example as a batch of one, cut to its own length."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            found.append({k: v[row : row + 1, :length] if v.dim() == 2 else v[row : row + 1] for k, v in batch.items()})
    return found


def loss64(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The models' loss, in the dtype of the model throughout (their own rounds logits to fp32)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits, labels, ignore_index=-100)


def trainable_copy(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A float64 copy with eager attention whose parameters all require grad."""
    twin = copy.deepcopy(model).double().eval().requires_grad_(True)
    twin.set_attn_implementation("eager")
    return twin, dict(twin.named_parameters())


def gradients(twin: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss64(twin, batch), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def mean_gradient(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    total = sum(len(b["input_ids"]) for b in batches)
    twin = trainable_copy(model)
    parts = [(len(b["input_ids"]) / total, gradients(*twin, b)) for b in batches]
    return {n: sum(share * g[n] for share, g in parts) for n in parts[0][1]}


def of_examples(
    model: nn.Module, batches: list[Batch], function: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Σ over examples of a function of the gradient of the example's own loss."""
    twin = trainable_copy(model)
    parts = [gradients(*twin, example) for example in singles(batches)]
    return {n: sum(function(g[n]) for g in parts) for n in parts[0]}


def hessian_gradient(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, torch.Tensor]:
    """H g by the forward derivative of the gradient in g's direction, over `names` only."""
    twin, parameters = trainable_copy(model)
    chosen = {n: parameters[n].detach() for n in names}
    total = sum(len(b["input_ids"]) for b in batches)

    def mean_loss(point: dict[str, torch.Tensor]) -> torch.Tensor:
        def at(batch: Batch) -> torch.Tensor:
            def call(**inputs: Any) -> Any:
                return torch.func.functional_call(twin, point, (), inputs)

            return loss64(call, batch)  # type: ignore[arg-type]

        return sum(len(b["input_ids"]) / total * at(b) for b in batches)  # type: ignore[return-value]

    gradient = torch.func.grad(mean_loss)
    with warnings.catch_warnings():  # torch's own forward derivatives still use torch.jit.script
        warnings.simplefilter("ignore", DeprecationWarning)
        product = torch.func.jvp(gradient, (chosen,), (gradient(chosen),))[1]
    return {n: h.detach() for n, h in product.items()}


def input_norms(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, torch.Tensor]:
    """‖x_i‖ over the tokens of all examples, shaped to multiply the weight."""
    twin, _ = trainable_copy(model)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        module = twin.get_submodule(name.removesuffix(".weight"))

        def hook(module: nn.Module, args: Any, name: str = name) -> None:
            squares = args[0].detach().reshape(-1, args[0].shape[-1]).square().sum(0)
            found[name] = found.get(name, 0) + (squares if isinstance(module, nn.Linear) else squares[:, None])

        module.register_forward_pre_hook(hook)
    for example in singles(batches):
        loss64(twin, example)
    return {n: s.sqrt() for n, s in found.items()}


class _Norm(nn.Module):
    """x over its root mean square, the latter a constant."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x / ((x**2).mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight
        return y if self.bias is None else y + self.bias


ACTIVATIONS = ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation")


def synaptic_flow(model: nn.Module, monkeypatch: Any) -> dict[str, torch.Tensor]:
    """∂R/∂|θ| of a copy with absolute weights, whose norms and activations are replaced module by module."""
    twin, _ = trainable_copy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm) or type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, _Norm(child))
            elif name in ACTIVATIONS:
                setattr(module, name, nn.Identity())
    parameters = dict(twin.named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.abs()
    with monkeypatch.context() as patch:
        patch.setattr(functional, "softmax", lambda x, *_, **__: x)
        ones = torch.ones(1, 1, twin.get_input_embeddings().weight.shape[1], dtype=torch.float64)
        total = twin(inputs_embeds=ones).logits.sum()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}
