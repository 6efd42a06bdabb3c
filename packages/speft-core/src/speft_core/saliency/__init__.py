"""Which weights matter: passes over the model, the table of metrics, and find_mask."""

from .find import find_mask, saliency_scores
from .metrics import METRICS

__all__ = ["METRICS", "find_mask", "saliency_scores"]
