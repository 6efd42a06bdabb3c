"""Which tensors of a fine-tuned checkpoint are which of its base, and what one of the two has alone.

A classifier's head that the base has not becomes part of the adapter, whole; what an adapter cannot hold (more layers, a head that
is no longer tied) is refused: it would be lost without a word. Output layers of another task that the base alone has stay behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from speft_core import UserError

from .checkpoint import LM_HEAD, Checkpoint

# Transformers' names for what stands on top of a classifier's body; of a pooler, masked language models have none.
POOLER = r"([a-z]\w*\.)?pooler\..+"
HEAD = re.compile(rf"(score|classifier|pre_classifier)\..+|{POOLER}")
# Buffers that older versions of Transformers stored and today's do not read: GPT-2's causal masks, Llama's rotary frequencies.
BUFFER = re.compile(r".+\.(attn|attention)\.(bias|masked_bias)|.+\.rotary_emb\.inv_freq")
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
HOLDS = "; an adapter cannot take layers away"
LOCAL_KEYS = ("_name_or_path", "name_or_path")  # paths of whoever trained it


def shared(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """What `tuned` calls a tensor -> what `base` calls it, for those that both have; with or without the model's prefix."""
    found = {key: stored for key in tuned.places if (stored := base.stored(key)) is not None}
    if not found:
        first = next(iter(base.places), "no tensor")
        raise UserError(
            f"{first} is in {base.folder} and not in {tuned.folder}, as are all others; they are not of one architecture"
        )
    return found


def is_classifier(dense: Iterable[str]) -> bool:
    """Whether heads of these names make a classifier: a pooler alone does not."""
    return any(not re.fullmatch(POOLER, name) for name in dense)


def check_missing(base: Checkpoint, tuned: Checkpoint, both: dict[str, str], classifier: bool) -> None:
    """UserError for a tensor that the base alone has and the fine-tuned class cannot do without.

    It can do without old buffers and a head that is the embeddings once more; a `classifier` with a head of its own also without the
    base's output layers (modules of which the fine-tuned checkpoint has nothing) and its pooler.
    """
    there = set(both.values())
    modules = {key.partition(".")[0] for key in there}
    for key, place in base.places.items():
        if key in there or not place.dtype.is_floating_point or BUFFER.fullmatch(key):
            continue
        if key.endswith(LM_HEAD) and len(base.keys_of(key)) > 1:
            continue
        output = key.partition(".")[0] not in modules or re.fullmatch(POOLER, key)
        if not (output and classifier):
            why = f", which has no head in its place (score, classifier){HOLDS}" if output else HOLDS
            raise UserError(f"{key} is in {base.folder} and not in {tuned.folder}{why}")


def added_heads(base: Checkpoint, tuned: Checkpoint, both: dict[str, str]) -> dict[str, torch.Tensor]:
    """The heads that `tuned` alone has; UserError naming the first tensor of it that an adapter cannot hold."""
    dense: dict[str, torch.Tensor] = {}
    for key, place in tuned.places.items():
        if key in both or not place.dtype.is_floating_point or BUFFER.fullmatch(key):
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
