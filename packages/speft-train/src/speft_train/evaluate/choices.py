"""Multiple choice by likelihood: the choice that the model finds most likely after the question.

Shape suffixes: B choices, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speft_core.errors import UserError

from ..config import RunConfig
from ..data.collate import Collator
from ..data.templates import choice_pieces, right_choice
from ..data.tokens import IGNORED, encode
from .batches import batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    cfg: RunConfig,
    progress: bool = True,
) -> dict[str, Any]:
    """{"accuracy", "accuracy_per_character", "count", "seconds"}: by the sum of the tokens' log-likelihoods, and by that
    sum over the length of the choice, so that long choices are not at a disadvantage (lm-eval's acc and acc_norm).
    """
    started = time.perf_counter()
    examples, owner = spelled_out(rows, tokenizer, cfg)
    scores = _log_likelihoods(model, tokenizer, examples, cfg.evaluate.batch_size, progress)
    right = [right_choice(question) for question in _questions(rows, cfg)]
    by_sum: list[list[float]] = [[] for _ in rows]
    by_length: list[list[float]] = [[] for _ in rows]
    for (place, length), score in zip(owner, scores, strict=True):
        by_sum[place].append(score)
        by_length[place].append(score / max(1, length))
    return {
        "accuracy": _share(by_sum, right),
        "accuracy_per_character": _share(by_length, right),
        "count": len(rows),
        "seconds": time.perf_counter() - started,
    }


def spelled_out(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, cfg: RunConfig
) -> tuple[list[dict[str, list[int]]], list[tuple[int, int]]]:
    """(each choice after its question as ids and labels, the question's place and the choice's characters)."""
    examples, owner = [], []
    for place, question in enumerate(_questions(rows, cfg)):
        for choice in range(len(question["choices"])):
            ids, learnt = encode(choice_pieces(question, choice), tokenizer)
            if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
                ids, learnt = ids[:-1], learnt[:-1]  # the choice, not that nothing follows it
            cut = max(0, len(ids) - cfg.data.max_length)
            ids, learnt = ids[cut:], learnt[cut:]  # of a long question the beginning goes
            if not any(learnt[1:]):
                raise UserError(f"data.max_length must hold the choices; {cfg.data.max_length} tokens do not")
            labels = [token if mark else IGNORED for token, mark in zip(ids, learnt, strict=True)]
            examples.append({"input_ids": ids, "labels": labels})
            owner.append((place, len(str(question["choices"][choice]).strip())))
    return examples, owner


def _questions(rows: Sequence[Mapping[str, Any]], cfg: RunConfig) -> list[dict[str, Any]]:
    columns = {role: cfg.data.columns.get(role, role) for role in ("question", "choices", "answer")}
    return [{role: row.get(column) for role, column in columns.items()} for row in rows]


@torch.no_grad()
def _log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, list[int]]],
    batch_size: int,
    progress: bool,
) -> list[float]:
    """The sum over the labelled tokens of each example, in the order given."""
    assert isinstance(tokenizer.pad_token_id, int)
    collate = Collator(tokenizer.pad_token_id)
    found = [0.0] * len(examples)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        lengths = [len(example["input_ids"]) for example in examples]
        for places in tqdm(list(batches(model, lengths, batch_size)), desc="choosing", unit=" batches", disable=not progress):
            batch = {key: value.to(device) for key, value in collate([examples[p] for p in places]).items()}
            logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            labels_BT = batch["labels"][:, 1:]
            losses_BT = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
            )
            for place, score in zip(places, (-losses_BT.sum(1)).tolist(), strict=True):
                found[place] = score
    finally:
        model.train(training)
    return found


def _share(scores: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    chosen = [max(range(len(row)), key=row.__getitem__) for row in scores]
    return sum(c == r for c, r in zip(chosen, right, strict=True)) / len(right)
