"""Classification data: a text or two and a label a row, as token ids; columns found by name, batches padded to their
own longest example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from speft_core.errors import UserError, nearest

from ..config import DataConfig
from .labels import LabelSpace
from .templates import templated
from .tokens import LengthReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
Encode = Callable[[str, "str | None"], dict[str, list[int]]]

ROLES = ("text", "text_pair", "label")
# Columns that published data sets use, tried in this order: (text, text_pair).
PAIRS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage")),
)
SINGLES = ("text", "sentence", "content", "review", "document", "question")
LABELS = ("label", "labels", "score", "class", "target")


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    text: str
    text_pair: str | None
    label: str


def find_columns(data: DataConfig, available: Sequence[str], source: str) -> Columns:
    """The columns that the config names, else those with well-known names. UserError when one is missing."""
    given = data.columns
    for role in given:
        if role not in ROLES:
            hint = nearest(role, ROLES)
            message = f"data.columns: classification has the roles {', '.join(ROLES)}; got {role!r}.{hint}"
            raise UserError(message.removesuffix("."))
    listed = ", ".join(available) or "none"
    for role, column in given.items():
        if column not in available:
            hint = nearest(column, list(available))
            message = f"{source} has no column {column!r} (data.columns.{role}); it has {listed}.{hint}"
            raise UserError(message.removesuffix("."))
    text, pair = given.get("text"), given.get("text_pair")
    if text is None and pair is None:
        text, pair = next((p for p in PAIRS if set(p) <= set(available)), (None, None))
    if text is None:
        text = next((name for name in SINGLES if name in available and name != pair), None)
    label = given.get("label") or next((name for name in LABELS if name in available), None)
    for role, found in (("text", text), ("label", label)):
        if found is None:
            raise UserError(f"{source} has no column of a known name for {role}; set data.columns.{role} to one of {listed}")
    assert text is not None and label is not None
    return Columns(text, pair, label)


class LabelledDataset(Dataset[dict[str, Any]]):
    """Encoded texts with their labels (whole numbers, or fractions for a regression)."""

    def __init__(self, encoded: Sequence[Mapping[str, list[int]]], labels: Sequence[int | float]) -> None:
        assert len(encoded) == len(labels)
        self.encoded, self.labels = list(encoded), list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.encoded[index], "labels": self.labels[index]}

    @property
    def lengths(self) -> list[int]:
        return [len(example["input_ids"]) for example in self.encoded]


@dataclass(frozen=True)
class LabelledCollator:
    """Makes a batch, each tensor (examples, longest) but the labels; padded on the side that the tokenizer pads."""

    pad_id: int
    left: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {"attention_mask": self._pad([[1] * len(example["input_ids"]) for example in examples], longest, 0)}
        for key in examples[0]:
            if key != "labels":
                fill = self.pad_id if key == "input_ids" else 0
                batch[key] = self._pad([example[key] for example in examples], longest, fill)
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def _pad(self, rows: Sequence[Sequence[int]], longest: int, fill: int) -> torch.Tensor:
        made = torch.full((len(rows), longest), fill, dtype=torch.int64)
        for place, row in enumerate(rows):
            made[place, slice(longest - len(row), longest) if self.left else slice(0, len(row))] = torch.tensor(row)
        return made


def encode_rows(
    rows: Rows, columns: Columns, space: LabelSpace, encode: Encode, max_length: int, overlong: str, source: str
) -> tuple[LabelledDataset, LengthReport, list[str]]:
    """(examples, what became of the rows, warnings); `encode` cuts what it is given to max_length + 1 tokens."""
    texts, empty = [], []
    for place, row in enumerate(rows, start=1):
        first, second = _text(row, columns.text, place, source), None
        if columns.text_pair is not None:
            second = _text(row, columns.text_pair, place, source)
        if not first.strip() or (second is not None and not second.strip()):
            empty.append(place)
        texts.append((first, second))
    encoded, labels, dropped, truncated = [], [], 0, 0
    for place, (row, (first, second)) in enumerate(zip(rows, texts, strict=True), start=1):
        try:
            example = encode(first, second)
        except UserError as error:
            raise UserError(f"{source} row {place}: {error}") from None
        if example.pop("overlong", None):
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
        encoded.append(example)
        labels.append(space.encode(row[columns.label]))
    lengths = [len(example["input_ids"]) for example in encoded]
    report = LengthReport(
        rows=len(rows), used=len(encoded), dropped=dropped, truncated=truncated, tokens=sum(lengths),
        learnt_tokens=0, longest=max(lengths, default=0),
    )  # fmt: skip
    said = []
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        said.append(f"warning: {source} has an empty text in row {', '.join(map(str, empty[:3]))}{more}")
    return LabelledDataset(encoded, labels), report, said


def _text(row: Mapping[str, Any], column: str, place: int, source: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(f"{source}: column {column} must hold texts; row {place} has a {type(value).__name__}")


def sentence(report: LengthReport, name: str, max_length: int) -> str:
    """One line for the terminal and the report."""
    text = f"{name}: {report.used} examples, {report.tokens} tokens, longest {report.longest}"
    if report.dropped:
        text += f"; {report.dropped} dropped, longer than {max_length} tokens"
    if report.truncated:
        text += f"; {report.truncated} cut to {max_length} tokens"
    return text


def encoder(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Encode:
    """How a text or two become token ids (and token types where the model has them), cut to data.max_length.

    Without data.instruction two texts are joined as the tokenizer joins pairs, or by a line break where it has no
    separator. With one, the texts are put into it, and of a long example the texts are cut, not the words around them.
    """
    instruction = data.instruction
    if instruction is not None and "{text}" not in instruction:
        raise UserError(f"data.instruction must hold {{text}}, where the text goes; got {instruction!r}")
    joined = instruction is None and tokenizer.sep_token_id is None
    chat = instruction is not None and data.template == "chat"
    types = "token_type_ids" in tokenizer.model_input_names

    def ids(first: str, second: str | None, limit: int | None = None) -> dict[str, list[int]]:
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        cut["add_special_tokens"] = not chat  # a chat template writes its own
        made = tokenizer(first, second, verbose=False, return_token_type_ids=types, return_attention_mask=False, **cut)
        return {key: list(made[key]) for key in ("input_ids", "token_type_ids") if key in made}

    def wrapped(first: str, second: str | None) -> str:
        assert instruction is not None
        parts = {"{text}": first, "{text_pair}": second or ""}
        filled = re.sub(r"\{text(?:_pair)?\}", lambda found: parts[found.group()], instruction)
        if not chat:
            return filled
        turns = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        return templated(tokenizer, [*turns, {"role": "user", "content": filled}], add_generation_prompt=True)

    def shortened(text: str, spare: int) -> str:
        tokens: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(tokenizer.decode(tokens[: max(0, len(tokens) - spare)]))

    def encode(first: str, second: str | None) -> dict[str, Any]:
        if instruction is None:
            if joined and second is not None:
                first, second = f"{first}\n{second}", None
            made: dict[str, Any] = ids(first, second)
            if len(made["input_ids"]) > data.max_length:
                made = {**ids(first, second, data.max_length), "overlong": True}
        else:
            made = ids(wrapped(first, second), None)
            for _ in range(8):
                spare = len(made["input_ids"]) - data.max_length
                if spare <= 0:
                    break
                if second is None or len(first) >= len(second):
                    first = shortened(first, spare)
                else:
                    second = shortened(second, spare)
                made = {**ids(wrapped(first, second), None), "overlong": True}
            if len(made["input_ids"]) > data.max_length:
                raise UserError(f"data.max_length must hold data.instruction; {data.max_length} tokens do not")
        return _never_padding(made, tokenizer)

    if chat and not tokenizer.chat_template:
        raise UserError("data.template chat needs a tokenizer with a chat template; this model's has none")
    return encode


def _never_padding(made: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Decoders find the last real token by looking for padding, so a text may not end in it, nor be empty."""
    ids = made["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.pad_token_id:
        ids.pop()
        if "token_type_ids" in made:
            made["token_type_ids"].pop()
    if not ids:
        some = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        made["input_ids"] = [next(token for token in some if token is not None)]
    return made
