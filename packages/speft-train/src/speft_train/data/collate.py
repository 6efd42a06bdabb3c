"""Batches: padded to their own longest example, on the right for training and on the left for generation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .tokens import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Collator:
    """Makes a training batch: input_ids, attention_mask and labels, each (examples, longest).

    With `trim_logits` the labels begin where the first answer of the batch begins, and `logits_to_keep` tells the
    model to compute as many logits, for the last tokens only. The loss is the same: nothing is learnt before. On
    SmolLM2-135M the logits are a quarter of the work, and most tokens of a short exercise are prompt.
    """

    pad_id: int
    trim_logits: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), longest)
        ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.as_tensor(example["input_ids"])
            mask[row, :length] = 1
            labels[row, :length] = torch.as_tensor(example["labels"])
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.trim_logits:
            kept = longest - _first_needed(labels)
            batch |= {"labels": labels[:, longest - kept :], "logits_to_keep": kept}
        return batch


def collator(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module | None = None) -> Collator:
    """The collator for a tokenizer; given a model that can leave out logits, one that asks for the needed ones only."""
    assert tokenizer.pad_token_id is not None, "models.load_tokenizer gives every tokenizer a padding token"
    able = model is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    return Collator(pad_id=tokenizer.pad_token_id, trim_logits=able)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of prompts that end together, as generation needs them."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _first_needed(labels_ET: torch.Tensor) -> int:
    """The first position whose logits count: the one before the first learnt token of any example."""
    learnt_T = (labels_ET != IGNORED).any(dim=0)
    learnt_T[0] = False  # nothing predicts the first token
    places = learnt_T.nonzero()
    return int(places[0]) - 1 if len(places) else labels_ET.shape[1] - 1
