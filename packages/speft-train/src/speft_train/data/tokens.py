"""Rendered examples as token ids, each marked as read or learnt; what is too long is dropped or cut, and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from .templates import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is read, not learnt
SHOW_PROGRESS_FROM = 5000  # rows; fewer take no noticeable time


@dataclass(frozen=True)
class LengthReport:
    """What became of the rows of one split."""

    rows: int
    used: int
    dropped: int
    truncated: int
    tokens: int
    learnt_tokens: int
    longest: int
    empty: Mapping[str, int] = field(default_factory=dict)  #: role -> rows left out because its text is empty

    def sentence(self, name: str, max_length: int) -> str:
        """One line for the terminal and the report."""
        text = f"{name}: {self.used} examples, {self.tokens} tokens of which {self.learnt_tokens} are learnt"
        text += f", longest {self.longest}"
        if self.dropped:
            text += f"; {self.dropped} dropped, longer than {max_length} tokens"
        if self.truncated:
            text += f"; {self.truncated} cut to {max_length} tokens"
        return text + "".join(f"; {count} left out, {role} empty" for role, count in self.empty.items())


class TokenDataset(Dataset[dict[str, list[int]]]):
    """Examples as two flat tensors and their bounds: 5 bytes a token however many examples there are."""

    def __init__(self, ids: Sequence[Sequence[int]], learnt: Sequence[Sequence[bool]]) -> None:
        lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int64)
        self.bounds = lengths.cumsum(0)
        self.ids = torch.tensor([token for row in ids for token in row], dtype=torch.int32)
        self.learnt = torch.tensor([mark for row in learnt for mark in row], dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        ids = self.ids[part]
        return {"input_ids": ids.tolist(), "labels": ids.masked_fill(~self.learnt[part], IGNORED).tolist()}

    def select(self, places: Sequence[int]) -> TokenDataset:
        """The examples at some places, in that order."""
        parts = [slice(int(self.bounds[place]), int(self.bounds[place + 1])) for place in places]
        return TokenDataset([self.ids[p].tolist() for p in parts], [self.learnt[p].tolist() for p in parts])

    @property
    def lengths(self) -> list[int]:
        return self.bounds.diff().tolist()


def tokenize(
    examples: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: str,
    prompt_loss: bool = False,
    name: str = "data",
) -> tuple[TokenDataset, LengthReport]:
    """Token ids of every example that fits; `overlong` is "drop", or "truncate" to cut the end off."""
    ids: list[list[int]] = []
    marks: list[list[bool]] = []
    dropped = truncated = 0
    shown = tqdm(
        examples, desc=f"tokenizing {name}", unit=" rows", disable=None if len(examples) >= SHOW_PROGRESS_FROM else True
    )
    for example in shown:
        tokens, learnt = encode(example, tokenizer, prompt_loss)
        if len(tokens) > max_length:
            tokens, learnt = tokens[:max_length], learnt[:max_length]
            if overlong == "drop" or not any(learnt[1:]):
                dropped += 1
                continue
            truncated += 1
        ids.append(tokens)
        marks.append(learnt)
    report = LengthReport(
        rows=len(examples),
        used=len(ids),
        dropped=dropped,
        truncated=truncated,
        tokens=sum(map(len, ids)),
        learnt_tokens=sum(map(sum, marks)),
        longest=max(map(len, ids), default=0),
    )
    return TokenDataset(ids, marks), report


def encode(
    example: Rendered, tokenizer: PreTrainedTokenizerBase, prompt_loss: bool = False
) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is learnt) of one example, with the tokenizer's start token and the end token of an
    answer.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    before = ""
    for place, piece in enumerate(example.pieces):
        part = _first(piece.text, tokenizer, example.special) if place == 0 else _next(before, piece.text, tokenizer)
        ids += part
        learnt += [piece.learn or prompt_loss] * len(part)
        before = piece.text or before
    if example.special and tokenizer.eos_token_id is not None and example.pieces[-1].learn:
        ids.append(tokenizer.eos_token_id)
        learnt.append(True)
    return ids, learnt


def prompt_ids(example: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt, the same that `encode` puts before the last answer."""
    last = max((i for i, piece in enumerate(example.pieces) if piece.learn), default=len(example.pieces))
    return encode(Rendered(example.pieces[:last], example.special), tokenizer)[0]


def _first(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    """Tokens of the first piece: with the start token, without an end token, for the text goes on."""
    ids = _ids(text, tokenizer, special)
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if special and len(ids) > 1 and ids[-1] in ends and ids != _ids(text, tokenizer, False):
        plain = _ids(text, tokenizer, False)
        if ids[-1 - len(plain) : -1] == plain:
            ids = ids[:-1]
    return ids


def _next(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a piece that follows another: some tokenizers start every text with a space, which does not belong
    here.
    """
    anchor = before[-1:]
    start = _ids(anchor, tokenizer, False)
    both = _ids(anchor + text, tokenizer, False)
    if both[: len(start)] == start:
        return both[len(start) :]
    return _ids(text, tokenizer, False)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(ids)
