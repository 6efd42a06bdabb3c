"""Small models, masks and comparisons that the tests of attach share. Not a test itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import speft_core as sc
from speft_core.ops import native
from speft_core.ops.plans import PLANS

DTYPES = [torch.float32, torch.bfloat16]
LINEAR = ["left.weight", "right.weight", "out.weight"]
PLAN_NAMES = [p for p in (*PLANS, "auto") if p != "native" or not native.reason()]


class Net(nn.Module):
    """Two linear layers that read one input, a norm, and one more linear layer; the middle ones without bias."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.left = nn.Linear(12, width)
        self.right = nn.Linear(12, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 31)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.embed(ids))
        return self.out(self.norm(torch.nn.functional.silu(self.left(x)) * self.right(x)))


IDS = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(5))
LABELS = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(6))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """A fresh Net; the same seed gives the same bits."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def loss_of(model: nn.Module) -> torch.Tensor:
    """Cross entropy of the fixed batch, in fp32."""
    logits = model(IDS).float()
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), LABELS.reshape(-1))


def some_mask(model: nn.Module, names: list[str] | None = None, density: float = 0.1, seed: int = 0) -> sc.SparsityMask:
    """A random mask over `names` (all parameters unless given), at least one entry each."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            k = max(1, round(density * parameter.numel()))
            indices[name] = torch.randperm(parameter.numel(), generator=generator)[:k].sort().values.to(torch.int32)
            shapes[name] = tuple(parameter.shape)
    return sc.SparsityMask(indices, shapes)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer of the state."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and, byte for byte, the same tensors (also -0.0 and NaN)."""

    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.detach().reshape(-1).contiguous().view(torch.uint8)

    return set(first) == set(second) and all(torch.equal(raw(first[k]), raw(second[k])) for k in first)


def oracle_gradients(
    model: nn.Module, mask: sc.SparsityMask, loss: Callable[[nn.Module], torch.Tensor] = loss_of
) -> dict[str, torch.Tensor]:
    """The masked entries of the dense gradient, from a copy of the model with plain torch."""
    dense = copy.deepcopy(model)
    parameters = dict(dense.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss(dense).backward()
    found = {}
    for name, indices_K in mask.indices.items():
        gradient = parameters[name].grad
        assert gradient is not None
        found[name] = gradient.reshape(-1)[indices_K.long()].clone()
    return found


def train(tuner: sc.Tuner, model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    """AdamW steps; returns the losses."""
    optimizer, losses = torch.optim.AdamW(tuner.parameters(), lr=lr), []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
