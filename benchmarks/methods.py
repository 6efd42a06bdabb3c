"""The methods under comparison, as a table: each makes a model trainable and returns its optimizer (None for the floor)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import speft_core as sc

LEARNING_RATE = 1e-4


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    """Fused, as the Trainer's default is: a loop over tensors costs LoRA, which has twice as many, most."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE, fused=True)


def floor(model: Any, spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer | None]:
    """All weights frozen, the embeddings' output requires grad: forward and the input gradient, nothing else."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    return model, None


def sparse(model: Any, spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer | None]:
    """speft with the mask file of the spec."""
    tuner = sc.attach(model, sc.SparsityMask.load(spec["mask"]), backward=spec.get("backward", "auto"))
    return model, _adamw(tuner.parameters())


def full(model: Any, spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer | None]:
    """Full fine-tuning."""
    return model, _adamw(model.parameters())


def lora(model: Any, spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer | None]:
    """PEFT LoRA of rank r on all linear layers."""
    import peft

    config = peft.LoraConfig(r=spec["r"], lora_alpha=2 * spec["r"], lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    return model, _adamw(model.parameters())


def shira(model: Any, spec: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer | None]:
    """PEFT SHiRA of rank r on all linear layers: as many parameters as LoRA of that rank."""
    import peft

    model = peft.get_peft_model(model, peft.ShiraConfig(r=spec["r"], target_modules="all-linear"))
    return model, _adamw(model.parameters())


METHODS: dict[str, Callable[[Any, dict[str, Any]], tuple[Any, torch.optim.Optimizer | None]]] = {
    method.__name__: method for method in (floor, sparse, lora, shira, full)
}
