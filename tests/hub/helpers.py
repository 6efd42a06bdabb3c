"""A model of two layers and random adapters for it: the smallest things to publish."""

from __future__ import annotations

import torch
from torch import nn

from speft_core import AdapterConfig, SparseAdapter, SparseDelta
from speft_core.fingerprint import fingerprint


class Pico(nn.Module):
    """Two layers and a head: the smallest thing an adapter can sit on."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.score = nn.Linear(12, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.score(x)


def pico_adapter(seed: int = 0, nnz: int = 20, model: Pico | None = None, dtype: torch.dtype = torch.float32) -> SparseAdapter:
    """A random adapter of a Pico, with a head."""
    model = model or Pico()
    draw = torch.Generator().manual_seed(seed + 1000)
    deltas, prints = {}, {}
    for name, weight in model.named_parameters():
        if name.startswith("layers") and name.endswith("weight"):
            indices = torch.randperm(weight.numel(), generator=draw)[:nnz].sort().values.int()
            deltas[name] = SparseDelta(indices, torch.randn(nnz, generator=draw).to(dtype), tuple(weight.shape))
            prints[name] = fingerprint(weight, indices)
    config = AdapterConfig(
        base_model_name_or_path="acme/pico",
        base_model_revision="a" * 40,
        task_type="SEQ_CLS",
        metric="gradient",
        scope="global",
        budget={"k": 2 * nnz},
        targets=["layers"],
        seed=seed,
    )
    return SparseAdapter(deltas, {"score.weight": torch.randn(3, 12, generator=draw)}, config, prints)
