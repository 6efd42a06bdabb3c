"""find_mask: from a model, calibration batches and a budget to the k scalars worth training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UserError, nearest
from ..mask import Budget, SparsityMask, budget_record
from ..random_mask import bernoulli_indices, random_indices, split_evenly
from ..select import SCOPES, select
from ..targets import Targets, base_parameters, parameter_shape, resolve_targets
from .gradients import Batch, LossFn, mean_gradient
from .metrics import METRICS


def find_mask(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    metric: str = "gradient",
    budget: Budget | None = None,
    targets: Targets = "all-linear",
    scope: str = "global",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    random_mode: str = "exact",
) -> SparsityMask:
    """Choose exactly the budget's k scalars of `targets`: those with the largest saliency.

    batches: calibration batches, each a mapping that `model(**batch)` accepts with labels; not read by data-free metrics.
    metric: a name of METRICS, or "random" (keyed by `seed` and tensor name; `random_mode` "exact" draws k in proportion to the
    tensors' sizes, "bernoulli" tosses a coin for each scalar, so that k holds only on average). scope: "global" compares scores
    across all targets, "local" gives each the same density. loss_fn(model, batch) replaces the model's own loss.

    UserError for an unknown metric or scope, targets that match nothing, a budget larger than the targets, no batches for a
    metric that needs them, or scores that are not finite.
    """
    budget = budget or Budget(density=0.005, of="targets")
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    names = resolve_targets(model, targets)
    shapes = {n: parameter_shape(p) for n, p in base_parameters(model).items() if n in set(names)}
    k = budget.resolve(model, names)
    made: dict[str, Any] = {"metric": metric, "scope": scope, "seed": seed, "budget": budget_record(budget)}
    made["targets"] = [targets] if isinstance(targets, str) else list(targets)
    if metric == "random":
        indices, made["random"] = _random(shapes, k, seed, random_mode)
        return SparsityMask(indices, shapes, made)
    scores = saliency_scores(model, batches, metric=metric, targets=targets, loss_fn=loss_fn)
    return SparsityMask(select(scores, k, scope), shapes, made)


def _random(
    shapes: dict[str, tuple[int, ...]], k: int, seed: int, mode: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    numels = {n: math.prod(s) for n, s in shapes.items()}
    if mode == "exact":
        shares = split_evenly(k, numels)
        return {n: random_indices(seed, n, numels[n], shares[n]) for n in shapes}, {"seed": seed, "mode": mode}
    if mode == "bernoulli":
        density = k / sum(numels.values())
        drawn = {n: bernoulli_indices(seed, n, numels[n], density) for n in shapes}
        return drawn, {"seed": seed, "mode": mode, "density": density}
    raise UserError(f"random_mode must be exact or bernoulli, got {mode!r}")


def saliency_scores(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    metric: str = "gradient",
    targets: Targets = "all-linear",
    loss_fn: LossFn | None = None,
) -> dict[str, torch.Tensor]:
    """Dense scores of `targets`: name -> tensor in the parameter's shape, at least fp32, the largest kept.

    For small models, plots and oracles: it holds one number per scalar. UserError as in find_mask.
    """
    if metric not in METRICS:
        allowed = [*METRICS, "random"]
        raise UserError(f"metric must be one of {', '.join(allowed)}, got {metric!r}.{nearest(metric, allowed)}")
    names = resolve_targets(model, targets)
    row, parameters = METRICS[metric], base_parameters(model)
    if not row.needs_gradient:
        return {n: row.score(_wide(parameters[n]), torch.empty(0)) for n in names}
    gradients = mean_gradient(model, batches, names, loss_fn)
    return {n: row.score(_wide(parameters[n]), gradients.pop(n)) for n in names}


def _wide(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
