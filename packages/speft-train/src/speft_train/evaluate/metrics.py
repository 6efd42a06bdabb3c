"""Figures of a classification or regression, by scikit-learn and SciPy, under the names that results.json uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Numbers = Sequence[float]


def accuracy(expected: Numbers, predicted: Numbers) -> float:
    """Share of examples whose class is right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(expected, predicted))


def f1(expected: Numbers, predicted: Numbers, classes: int) -> float:
    """F1 of the second of two `classes`, as GLUE counts it (1 of 0 and 1); of more the unweighted mean over those that any label
    or prediction names, as scikit-learn takes it.
    """
    from sklearn.metrics import f1_score

    which: dict[str, Any] = {"labels": [0, 1], "average": "binary"} if classes == 2 else {"average": "macro"}
    return float(f1_score(expected, predicted, **which, zero_division=0.0))


def matthews(expected: Numbers, predicted: Numbers) -> float:
    """Matthews correlation; 0 when all examples are given one class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))


def pearson(expected: Numbers, predicted: Numbers) -> float:
    """Pearson correlation; 0 when one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, expected, predicted)


def spearman(expected: Numbers, predicted: Numbers) -> float:
    """Spearman's rank correlation; 0 when one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, expected, predicted)


CLASSES: dict[str, Callable[..., float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
NUMBERS: dict[str, Callable[[Numbers, Numbers], float]] = {"pearson": pearson, "spearman": spearman}


def figures(expected: Numbers, outputs: Sequence[Sequence[float]], regression: bool) -> dict[str, float]:
    """All metrics that fit, from the labels and the head's outputs (examples, outputs)."""
    if regression:
        values = [row[0] for row in outputs]
        return {name: metric(expected, values) for name, metric in NUMBERS.items()}
    chosen = [max(range(len(row)), key=row.__getitem__) for row in outputs]
    metrics = CLASSES | {"f1": partial(f1, classes=len(outputs[0]))}  # how many there are, not how many come up here
    return {name: metric(expected, chosen) for name, metric in metrics.items()}


def _correlation(function: Callable[..., Any], expected: Numbers, predicted: Numbers) -> float:
    if len(expected) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant input, for which it gives NaN
        value = float(function(expected, predicted).statistic)
    return 0.0 if math.isnan(value) else value
