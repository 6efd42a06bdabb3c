"""speft_core: choose k scalars of a model, train only those, ship them in a few megabytes, undo them bit for bit."""

from .adapter import AdapterConfig, Applied, SparseAdapter
from .attach import PlanRow, Tuner, attach
from .bank import AdapterBank
from .delta import SparseDelta
from .dynamic import DynamicMask
from .errors import UserError
from .mask import Budget, SparsityMask
from .merge import merge, merge_report, subtract
from .merge_methods import METHODS as MERGE_METHODS
from .multihead import HeadOutput, MultiHeadModel
from .saliency import METRICS, Metric, find_mask, register_metric, saliency_scores, weight_change

__all__ = [
    "MERGE_METHODS",
    "METRICS",
    "AdapterBank",
    "AdapterConfig",
    "Applied",
    "Budget",
    "DynamicMask",
    "HeadOutput",
    "Metric",
    "MultiHeadModel",
    "PlanRow",
    "SparseAdapter",
    "SparseDelta",
    "SparsityMask",
    "Tuner",
    "UserError",
    "attach",
    "find_mask",
    "merge",
    "merge_report",
    "register_metric",
    "saliency_scores",
    "subtract",
    "weight_change",
]
