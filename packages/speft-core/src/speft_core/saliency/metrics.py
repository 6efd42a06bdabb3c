"""The table of saliency metrics: name, the statistic it reads, and the score as one function of weight and statistic.

Scores are such that the largest are kept (SPEFT, arXiv 2412.13488, table 1). A metric of one's own is one more row:
`register_metric("mine", lambda weight, gradient: ...)`, or a function given to find_mask in place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError, nearest
from ..partitioned import own_part
from ..targets import base_parameters, parameter_shape
from .grasp import hessian_gradient
from .passes import Pass, Statistics, absolute_gradient, input_norms, mean_gradient, squared_gradient
from .synflow import synaptic_flow

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def nothing(run: Pass, names: Sequence[str]) -> Statistics:
    """For scores of the weights alone."""
    return {n: torch.empty(0) for n in names}


@dataclass(frozen=True)
class Statistic:
    """A row of the table of passes. `compute` fills one group of targets; the options it reads are named. needs_whole: it
    reads or changes weights outside their own layer's forward, so that these must not lie in shards.
    """

    compute: Callable[[Pass, Sequence[str]], Statistics]
    reads_batches: bool
    options: tuple[str, ...] = ()
    needs_whole: bool = False


STATISTICS: dict[str, Statistic] = {
    "none": Statistic(nothing, False),
    "gradient": Statistic(mean_gradient, True),
    "squared_gradient": Statistic(squared_gradient, True),
    "absolute_gradient": Statistic(absolute_gradient, True),
    "input_norm": Statistic(input_norms, True),
    "hessian_gradient": Statistic(hessian_gradient, True, ("sign", "hessian", "step"), needs_whole=True),
    "synaptic_flow": Statistic(synaptic_flow, False, needs_whole=True),
}


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    statistic: a name of STATISTICS, or a Statistic of one's own. score(weight, statistic): elementwise, on flat parts of equal
    length, at least fp32. rank: sorts as score does and is used in its place to choose single entries, where the score
    itself would underflow.
    """

    name: str
    statistic: str | Statistic
    score: Score
    formula: str
    rank: Score | None = None

    @property
    def source(self) -> Statistic:
        """The row of STATISTICS that the scores are made of."""
        return self.statistic if isinstance(self.statistic, Statistic) else STATISTICS[self.statistic]

    @property
    def needs_gradient(self) -> bool:
        """Whether calibration batches are read."""
        return self.source.reads_batches


def _random(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    raise UserError("the random metric draws indices from the seed and has no scores")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("magnitude", "none", lambda w, _: w.abs(), "|θ|"),
        Metric("gradient", "gradient", lambda w, g: g.abs(), "|g|, g the mean signed gradient"),
        Metric("snip", "gradient", lambda w, g: (g * w).abs(), "|g ⊙ θ|"),
        Metric("force", "gradient", lambda w, g: -g * w, "−g ⊙ θ, signed"),
        Metric("taylor_fo", "gradient", lambda w, g: (g * w).square(), "(g ⊙ θ)²", rank=lambda w, g: (g * w).abs()),
        Metric("synflow", "synaptic_flow", lambda w, r: (r * w).abs(), "|∂R/∂θ ⊙ θ|, R = 1ᵀ(∏|θ⁽ˡ⁾|)1"),
        Metric("grasp", "hessian_gradient", lambda w, h: h * w, "−(H g) ⊙ θ"),
        Metric("fisher", "squared_gradient", lambda w, f: f, "Σ over examples of (∂ℓ/∂θ)²"),
        Metric("absolute_gradient", "absolute_gradient", lambda w, a: a, "mean over examples of |∂ℓ/∂θ|"),
        Metric("wanda", "input_norm", lambda w, x: w.abs() * x, "|θ| ‖x‖₂"),
        Metric("random", "none", _random, "drawn from the seed, keyed by tensor name"),
    )
}


def register_metric(
    name: str, score: Score, statistic: str | Statistic = "gradient", formula: str = "", replace: bool = False
) -> Metric:
    """Add a metric to the table, so that `find_mask` can name it. score(weight, statistic) as in Metric.

    UserError for a name that is taken (unless `replace`) or a statistic that does not exist.
    """
    if name in METRICS and not replace:
        raise UserError(f"a metric named {name!r} exists already; give replace=True to take its place")
    METRICS[name] = make_metric(name, score, statistic, formula)
    return METRICS[name]


def make_metric(name: str, score: Score, statistic: str | Statistic = "gradient", formula: str = "") -> Metric:
    """A checked row for a function."""
    if isinstance(statistic, str) and statistic not in STATISTICS:
        raise UserError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}.{nearest(statistic, STATISTICS)}")
    if not callable(score):
        raise UserError(f"a metric's score must be a function of (weight, statistic), got {type(score).__name__}")
    return Metric(name, statistic, score, formula)


def weight_change(tuned: nn.Module | Mapping[str, torch.Tensor]) -> Metric:
    """|θ_tuned − θ|: how far full fine-tuning moved each weight (LT-SFT, arXiv 2110.07560).

    `tuned` is the fully fine-tuned model, or its state dict; the model given to find_mask is the base.
    """
    after = dict(base_parameters(tuned)) if isinstance(tuned, nn.Module) else tuned

    def take(run: Pass, names: Sequence[str]) -> Statistics:
        found, own = {}, base_parameters(run.model)
        for name in names:
            shape = parameter_shape(own[name])
            if name not in after or parameter_shape(after[name]) != shape:
                raise UserError(f"weight_change needs {name} of shape {shape} in the tuned model")
            found[name] = own_part(after[name]).to(own[name].device)
        return found

    return Metric("weight_change", Statistic(take, False), lambda w, a: (a.to(w.dtype) - w).abs(), "|θ_tuned − θ|")


def given_scores(scores: Mapping[str, torch.Tensor]) -> Metric:
    """Scores that were computed elsewhere: name -> tensor in the parameter's shape."""

    def take(run: Pass, names: Sequence[str]) -> Statistics:
        for name in names:
            if name not in scores or tuple(scores[name].shape) != parameter_shape(base_parameters(run.model)[name]):
                raise UserError(f"the given scores need {name} in the parameter's shape; they lack it or differ")
        return {n: scores[n].detach().to(base_parameters(run.model)[n].device) for n in names}

    return Metric("given", Statistic(take, False), lambda w, s: s.to(w.dtype), "scores given by the caller")


def as_metric(metric: Any) -> Metric:
    """The row that `metric` means: a name, a row, a function of (weight, mean gradient), or ready scores."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, Mapping):
        return given_scores(metric)
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UserError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.{nearest(metric, METRICS)}")
        return METRICS[metric]
    return make_metric(getattr(metric, "__name__", "own"), metric)
