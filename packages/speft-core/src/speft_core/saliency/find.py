"""find_mask: from a model, calibration batches and a budget to the k scalars worth training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError, nearest
from ..mask import Budget, SparsityMask, budget_record
from ..partitioned import is_partitioned, own_part, shards_of
from ..random_mask import bernoulli_indices, random_indices, split_evenly
from ..select import SCOPES, LazyScores
from ..structured import Structure, matrix_shape
from ..targets import Targets, base_parameters, parameter_shape, resolve_targets
from .calibration import Batch, Calibration, LossFn
from .choose import Bound, Chooser
from .memory import default_limit, plan_groups
from .metrics import Metric, Score, as_metric
from .passes import SHARED, Pass
from .peers import Peers
from .sums import wide_dtype

AnyMetric = str | Metric | Score | Mapping[str, torch.Tensor]


def find_mask(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    metric: AnyMetric = "gradient",
    budget: Budget | None = None,
    targets: Targets = "all-linear",
    scope: str = "global",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    random_mode: str = "exact",
    *,
    structure: str = "entries",
    min_per_layer: Bound = None,
    max_per_layer: Bound = None,
    options: Mapping[str, Any] | None = None,
    peers: Peers | None = None,
) -> SparsityMask:
    """Choose exactly the budget's k scalars of `targets`: those with the largest saliency.

    batches: calibration batches, each a mapping that `model(**batch)` accepts with labels; not read by data-free metrics.
    metric: a name of METRICS, a function of (weight, mean gradient), a Metric, or ready scores (name -> tensor). "random" is
    keyed by `seed` and tensor name; `random_mode` "exact" draws k in proportion to the tensors' sizes, "bernoulli" tosses a
    coin for each scalar, so that k holds only on average. scope: "global" compares scores across all targets, "local" gives
    each the same density. loss_fn(model, batch) replaces the model's own loss. memory_limit: bytes for accumulators on each
    of the model's devices (None: half of what is free on a GPU); beyond it they go to host memory, then to several passes. It
    changes no bit of the mask (GRaSP's `hessian="auto"` aside).
    structure: "entries", "rows", "columns", "blocks:B" or "N:M" (see structured.py).
    min_per_layer, max_per_layer: bounds on the entries of each target, a count, or a share of the target when a float.
    options: of the metric, such as {"sign": 1} for grasp. peers: ranks that share the pass (see peers.py): all call this with the
    same arguments, rank 0 gets the mask, the others an empty one. Metrics whose pass cannot be shared run on rank 0 alone. Ranks
    that hold the weights in shards (ZeRO-3) choose together and all get the mask.

    The model may have a tuner attached: it is then scored as it has become. UserError for an unknown metric, scope, structure
    or option, targets that match nothing, a budget larger than the targets, no batches for a metric that needs them, or
    scores that are not finite.
    """
    budget, row, form = budget or Budget(density=0.005, of="targets"), as_metric(metric), Structure.parse(structure)
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    _sync(model)
    names = resolve_targets(model, targets)
    parameters = base_parameters(model)
    shapes = {n: parameter_shape(parameters[n]) for n in names}
    k = budget.resolve(model, names)
    made: dict[str, Any] = {"metric": row.name, "scope": scope, "seed": seed, "budget": budget_record(budget)}
    made["targets"] = [targets] if isinstance(targets, str) else list(targets)
    bounds = {"structure": structure if form else None, "min_per_layer": min_per_layer, "max_per_layer": max_per_layer}
    made |= {key: value for key, value in bounds.items() if value is not None}
    if row.name == "random":
        if form or min_per_layer is not None or max_per_layer is not None:
            raise UserError("the random metric takes no structure, min_per_layer or max_per_layer")
        indices, made["random"] = _random(shapes, k, seed, random_mode)
        return SparsityMask(indices, shapes, made)
    for name, shape in shapes.items() if form else ():
        matrix_shape(name, shape)
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    floors, caps = _bounds("min_per_layer", min_per_layer, sizes), _bounds("max_per_layer", max_per_layer, sizes)
    chooser = Chooser(sizes, shapes, k, scope, floors, caps, form)
    peers = peers if peers is not None and peers.world > 1 else None
    together = _in_shards([parameters[n] for n in names], row, peers)
    is_peer = peers is not None and peers.rank > 0 and not together
    if is_peer and row.source.compute not in SHARED:
        return SparsityMask({}, {}, made)
    shared_by = peers if row.source.compute in SHARED else None
    if memory_limit is None and row.source.compute in SHARED:  # the others hold more than sums
        memory_limit = default_limit(model, names)
        memory_limit = shared_by.least(memory_limit) if shared_by is not None else memory_limit
    groups = plan_groups(model, names, memory_limit)
    if shared_by is not None:
        groups = shared_by.first(groups)  # free host memory may differ
    calibration = Calibration(model, batches, loss_fn, shared_by, together)
    if len(groups) > 1:
        calibration.keep()
    in_host_memory = {n: "cpu" for group in groups for n, place in group.items() if place == "cpu"}
    run = Pass(model, calibration, names, in_host_memory, _options(row, options))
    for group in groups:
        statistics = row.source.compute(run, list(group))
        if is_peer:
            continue
        rank = row.rank if row.rank and not form else row.score
        chooser.add({n: _lazy(rank, parameters[n], statistics[n], peers) for n in group})
        del statistics
    if is_peer:
        return SparsityMask({}, {}, made)
    if row.source.reads_batches:
        made["examples"] = calibration.examples
    return SparsityMask(chooser.result(), shapes, made | run.notes)


def _sync(model: nn.Module) -> None:
    """An attached model's weights take up the optimizer's last step: some metrics read them with no forward before."""
    tuner = getattr(model, "_speft_tuner", None)
    if tuner is not None:
        tuner.sync()


def _in_shards(targets: list[nn.Parameter], row: Metric, peers: Peers | None) -> bool:
    """Whether the ranks hold shards of the weights, and so go together; UserError for what cannot be done then."""
    if not any(is_partitioned(p) for p in targets):
        return False
    if row.source.needs_whole:
        raise UserError(
            f"the metric {row.name} cannot read weights that are partitioned over the ranks (ZeRO stage 3); find this mask where"
            " they are whole (stage 0 to 2), or choose another metric"
        )
    shards = max(shards_of(p) for p in targets)
    if shards != (1 if peers is None else peers.world):
        raise UserError(f"the weights lie in shards on {shards} ranks: find_mask needs as many peers")
    return shards > 1


def _options(row: Metric, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for key in options or {}:
        if key not in row.source.options:
            allowed = ", ".join(row.source.options) or "none"
            raise UserError(f"options of {row.name} are {allowed}, got {key!r}.{nearest(key, row.source.options)}")
    return options or {}


def _bounds(what: str, bound: Bound, sizes: Mapping[str, int]) -> dict[str, int]:
    """Entries per target: a count as it is, a float as a share of each target."""
    if bound is None:
        return {}
    is_share = isinstance(bound, float)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound < 0 or (is_share and bound > 1):
        raise UserError(f"{what} must be a whole number of at least 0, or a share in [0.0, 1.0], got {bound!r}")
    return {n: round(bound * size) if is_share else int(bound) for n, size in sizes.items()}


def _random(shapes: dict[str, tuple[int, ...]], k: int, seed: int, mode: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    numels = {n: math.prod(s) for n, s in shapes.items()}
    if mode == "exact":
        shares = split_evenly(k, numels)
        return {n: random_indices(seed, n, numels[n], shares[n]) for n in shapes}, {"seed": seed, "mode": mode}
    if mode == "bernoulli":
        density = k / sum(numels.values())
        drawn = {n: bernoulli_indices(seed, n, numels[n], density) for n in shapes}
        return drawn, {"seed": seed, "mode": mode, "density": density}
    raise UserError(f"random_mode must be exact or bernoulli, got {mode!r}")


def _lazy(score: Score, parameter: nn.Parameter, statistic: torch.Tensor, peers: Peers | None = None) -> LazyScores:
    """Scores of one parameter, made for a stretch of flat indices at a time; where ranks hold shards, each by its holder."""
    weight, shape, dtype = own_part(parameter).reshape(-1), parameter_shape(parameter), wide_dtype(parameter.dtype)
    numel, size, shards = math.prod(shape), weight.numel(), shards_of(parameter)
    first = size * peers.rank if peers is not None and shards > 1 else 0
    part_of = _flat_part(statistic, shape, first if statistic.shape == weight.shape else 0)

    def here(start: int, stop: int) -> torch.Tensor:
        weight_N, part_N = weight[start - first : stop - first].to(dtype), part_of(start, stop)
        # Where the accumulator is in host memory, the weights' part goes there: a sum of scores is not moved about.
        return score(weight_N.to(part_N.device) if part_N.numel() else weight_N, part_N)

    def there(start: int, stop: int) -> torch.Tensor:
        assert peers is not None
        found = torch.empty(stop - start, dtype=dtype, device=parameter.device)
        for owner in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, owner * size), min(stop, (owner + 1) * size)
            peers.told_by(owner, partial(here, low, high), found[low - start : high - start])
        return found

    return LazyScores(numel, here if shards == 1 else there)


def _flat_part(statistic: torch.Tensor, shape: tuple[int, ...], first: int) -> Callable[[int, int], torch.Tensor]:
    """Flat parts of a statistic that has the parameter's shape, broadcasts against it as a matrix, is empty, or is the rank's
    shard, which begins with the entry `first`.
    """
    if statistic.numel() == 0:
        return lambda start, stop: statistic
    flat = statistic.reshape(-1)
    if tuple(statistic.shape) == shape or statistic.dim() < 2:
        return lambda start, stop: flat[start - first : stop - first]

    def broadcast(start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop, device=flat.device)
        return flat[position % shape[-1] if statistic.shape[0] == 1 else position // shape[-1]]

    return broadcast


def saliency_scores(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    metric: AnyMetric = "gradient",
    targets: Targets = "all-linear",
    loss_fn: LossFn | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Dense scores of `targets`: name -> tensor in the parameter's shape, at least fp32, the largest kept.

    For small models, plots and oracles: it holds one number per scalar. UserError as in find_mask.
    """
    _sync(model)
    row, names, parameters = as_metric(metric), resolve_targets(model, targets), base_parameters(model)
    if any(shards_of(p) > 1 for p in parameters.values()):
        raise UserError("saliency_scores needs the weights whole; they are partitioned over the ranks (ZeRO stage 3): use find_mask")
    run = Pass(model, Calibration(model, batches, loss_fn), names, options=_options(row, options))
    statistics = row.source.compute(run, names)
    lazy = {n: _lazy(row.score, parameters[n], statistics[n]) for n in names}
    return {n: s.at(0, s.numel).reshape(parameters[n].shape).clone() for n, s in lazy.items()}
