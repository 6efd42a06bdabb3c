"""Tensors that a fine-tuned checkpoint has and its base has not: a classifier's head becomes part of the adapter, whole.

What an adapter cannot hold (more layers, a head that is no longer tied) is refused: it would be lost without a word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from speft_core import UserError

from .checkpoint import LM_HEAD, Checkpoint

HEAD = re.compile(r"(score|classifier|pre_classifier)\..+")  # Transformers' names for the module on top of a classifier's body
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
LOCAL_KEYS = ("_name_or_path", "name_or_path")  # paths of whoever trained it


def added_heads(base: Checkpoint, tuned: Checkpoint) -> dict[str, torch.Tensor]:
    """The heads that `tuned` alone has; UserError naming the first tensor of it that an adapter cannot hold."""
    dense: dict[str, torch.Tensor] = {}
    for key, place in tuned.places.items():
        if key in base.places or not place.dtype.is_floating_point:
            continue
        alone = f"{key} is in {tuned.folder} alone"
        if key.endswith(LM_HEAD):
            if not tuned.is_tied_copy(key):
                raise UserError(f"{alone}: {base.folder} ties its head to the embeddings, and an adapter cannot untie them")
            continue
        if not HEAD.fullmatch(key):
            raise UserError(f"{alone}; of what the base has not, an adapter can hold a classifier's head (score, classifier)")
        with tuned.tensor(key) as tensor:
            if not bool(torch.isfinite(tensor.float()).all()):
                raise UserError(f"{key} holds NaN or infinity in {tuned.folder}")
            dense[key] = tensor.clone()
    return dense


def task_type(tuned: Checkpoint) -> str:
    """What a checkpoint with a head of its own does, by its architecture; a text's class where it does not say."""
    told = [str(a) for a in tuned.config.get("architectures") or []]
    return next((task for ending, task in TASK_TYPES.items() for a in told if a.endswith(ending)), "SEQ_CLS")


def keep_config(tuned: str | Path, folder: Path) -> None:
    """Put the configuration of a checkpoint, which has its labels, beside the adapter that was made of it."""
    config = {k: v for k, v in Checkpoint(tuned).config.items() if k not in LOCAL_KEYS}
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
