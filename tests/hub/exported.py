"""Random adapters of pico models, and the logits that an export of one must give again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import pico
from speft_core import AdapterConfig, SparseAdapter, SparseDelta
from speft_core.fingerprint import fingerprint


def adapter_for(
    model: PreTrainedModel,
    base: str,
    dtype: torch.dtype | None = None,
    dense: dict[str, Any] | None = None,
    skip: str = "",
    **config: Any,
) -> SparseAdapter:
    """Thirty random changes in every parameter of the model."""
    draw = torch.Generator().manual_seed(5)
    deltas, prints = {}, {}
    for name, weight in model.named_parameters():
        if skip and skip in name:
            continue
        k = min(30, weight.numel() // 2)
        indices = torch.randperm(weight.numel(), generator=draw)[:k].sort().values.int()
        deltas[name] = SparseDelta(indices, torch.randn(k, generator=draw).to(dtype or weight.dtype), tuple(weight.shape))
        prints[name] = fingerprint(weight, indices)
    return SparseAdapter(deltas, dense or {}, AdapterConfig(base_model_name_or_path=base, **config), prints)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in pico.batch(model).items() if k != "labels"}).logits
