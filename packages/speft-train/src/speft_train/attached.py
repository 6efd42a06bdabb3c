"""What a way to adapt a model gives the run: something trainable, and how it is saved, taken off and put on again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import speft_core as sc

from .config import AdapterSection, RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A model with something trainable on it."""

    model: Any  #: what the Trainer trains
    trainable: int  #: scalars that are trained
    #: called by all ranks, which may hold shards; what it gives rank 0 (for which it is called with True) writes what ships
    collect: Callable[[bool], Callable[[Path], None]]
    detach: Callable[[], None]  #: take it off; the base is as before
    about: str = ""  #: for the terminal, after the count
    tuner: sc.Tuner | None = None  #: of a sparse method


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    needs_mask: bool
    attach: Callable[[Any, RunConfig, sc.SparsityMask | None], Attached]
    applied: Callable[[Any, RunConfig, Path, int], AbstractContextManager[Any]]  #: the base with a saved folder on it, on so many ranks


def budget_of(section: AdapterSection) -> sc.Budget:
    """The config's budget as core's."""
    return sc.Budget(**{key: value for key, value in asdict(section.budget).items() if value is not None})
