"""Which weights matter: passes over the model, the table of metrics, and find_mask."""

from .find import find_mask, saliency_scores
from .metrics import METRICS, Metric, register_metric, weight_change

__all__ = ["METRICS", "Metric", "find_mask", "register_metric", "saliency_scores", "weight_change"]
