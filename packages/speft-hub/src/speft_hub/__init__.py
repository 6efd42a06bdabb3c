"""Publish, verify, merge and export sparse adapters: the Hugging Face Hub, a compatible endpoint, or a plain folder."""

from .addresses import Reference, parse
from .card import CardFields
from .evaluation import Evaluation
from .pulling import Pulled, check_folder, pull
from .pushing import Pushed, push
from .registry import NotFound, StaleParent

__all__ = [
    "CardFields",
    "Evaluation",
    "NotFound",
    "Pulled",
    "Pushed",
    "Reference",
    "StaleParent",
    "check_folder",
    "parse",
    "pull",
    "push",
]
