"""The table of saliency metrics: name, what the scores need, and the score as one function of weight and gradient.

Scores are such that the largest are kept (SPEFT, arXiv 2412.13488, table 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Metric:
    """A row of the table. `score(weight, gradient)` returns fp32 scores in the weight's shape; data-free metrics get an empty gradient."""

    name: str
    needs_gradient: bool
    score: Score
    formula: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("magnitude", False, lambda w, g: w.abs(), "|θ|"),
        Metric("gradient", True, lambda w, g: g.abs(), "|g|, g the mean signed gradient"),
    )
}
