"""speft_core: choose k scalars of a model, train only those, ship them in a few megabytes, undo them bit for bit."""

from .adapter import AdapterConfig, Applied, SparseAdapter
from .attach import PlanRow, Tuner, attach
from .delta import SparseDelta
from .errors import UserError
from .mask import Budget, SparsityMask
from .saliency import METRICS, find_mask, saliency_scores

__all__ = [
    "METRICS",
    "AdapterConfig",
    "Applied",
    "Budget",
    "PlanRow",
    "SparseAdapter",
    "SparseDelta",
    "SparsityMask",
    "Tuner",
    "UserError",
    "attach",
    "find_mask",
    "saliency_scores",
]
