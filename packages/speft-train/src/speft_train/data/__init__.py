"""Data of a run: sources, templates, token data sets, batches."""

from .build import DataBundle, build, calibration_rows, load_more_tests, load_splits
from .collate import Collator, collator, left_padded
from .sources import fingerprint, load_rows
from .tokens import LengthReport, TokenDataset, prompt_ids, tokenize

__all__ = [
    "Collator",
    "DataBundle",
    "LengthReport",
    "TokenDataset",
    "build",
    "calibration_rows",
    "collator",
    "fingerprint",
    "left_padded",
    "load_more_tests",
    "load_rows",
    "load_splits",
    "prompt_ids",
    "tokenize",
]
