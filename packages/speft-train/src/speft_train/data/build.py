"""From the `data` section of a config to token data sets and the rows to evaluate on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speft_core.errors import UserError

from ..config import DataConfig, RunConfig
from .collate import Collator, collator
from .sources import READERS, NoSplitError, Rows, available_columns, file_kind, load_rows
from .templates import TEMPLATES, EmptyText, Rendered, columns_of
from .tokens import LengthReport, TokenDataset, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_MISTAKES = 3


@dataclass(frozen=True, kw_only=True)
class Usable:
    """The rows of a source that its template can use, each with its text, and how many were left out: role -> empty texts.

    It depends on the rows alone: every rank has the same.
    """

    rows: Rows
    examples: list[Rendered]
    empty: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """The data of a run. Rows are as they came, examples are rendered, data sets are token ids."""

    train: TokenDataset
    validation: TokenDataset | None = None
    test: TokenDataset | None = None  # for the loss on held-out answers
    train_rows: Rows = field(default_factory=list)
    test_rows: Rows = field(default_factory=list)  # for choices
    validation_rows: Rows = field(default_factory=list)  # the same, where there are no test data
    test_examples: list[Rendered] = field(default_factory=list)  # these rows as text, for generation
    validation_examples: list[Rendered] = field(default_factory=list)
    reports: dict[str, LengthReport] = field(default_factory=dict)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> Collator:
        """Makes batches of these examples."""
        return collator(tokenizer, model)

    def summary(self, cfg: DataConfig) -> list[str]:
        """A line a split: how many examples and tokens, and what was dropped, cut or left out."""
        return [report.sentence(name, cfg.max_length) for name, report in self.reports.items()]


def build(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DataBundle:
    """Load, render and tokenize all data of a run. Raises a UserError that names the source and the row of what is
    wrong. Prompts are learnt of training examples alone: what is measured is the loss of answers.
    """
    data = cfg.data
    if data.more_tests:
        raise UserError(f"data.more_tests is for model.task sequence_classification; the task is {cfg.model.task}")
    rows = load_splits(data)
    sets: dict[str, TokenDataset] = {}
    reports: dict[str, LengthReport] = {}
    kept: dict[str, Usable] = {}
    for name, split_rows in rows.items():
        source = {"train": data.train, "validation": data.validation or data.train, "test": data.test or data.train}[name]
        usable = render(split_rows, tokenizer, data, source)
        prompts = data.prompt_loss and name == "train"
        sets[name], report = tokenize(usable.examples, tokenizer, data.max_length, data.overlong, prompts, name)
        reports[name] = replace(report, rows=len(split_rows), empty=usable.empty)
        kept[name] = usable
    if reports["train"].used == 0:
        raise UserError(
            f"data.max_length must leave at least one training example;"
            f" {data.max_length} leaves none of {reports['train'].rows}"
        )
    none = Usable(rows=[], examples=[], empty={})
    return DataBundle(
        train=sets["train"],
        validation=_non_empty(sets.get("validation")),
        test=_non_empty(sets.get("test")),
        train_rows=kept["train"].rows,
        test_rows=kept.get("test", none).rows,
        validation_rows=kept.get("validation", none).rows,
        test_examples=kept.get("test", none).examples,
        validation_examples=kept.get("validation", none).examples,
        reports=reports,
    )


def load_splits(data: DataConfig) -> dict[str, Rows]:
    """Rows of train, and of validation and test where there are any."""
    rows: dict[str, Rows] = {}
    held = data.validation_from_train
    if held and data.validation is not None:
        raise UserError("data: set validation or validation_from_train, not both")
    if held and not data.train.startswith("bundled:"):
        everything = _taken(data.train, data.train_split, None, data)
        if held >= len(everything):
            raise UserError(
                f"data.validation_from_train must be less than the {len(everything)} rows of {data.train}; got {held}"
            )
        rows["train"] = everything[:-held][: data.train_size]
        rows["validation"] = everything[-held:]
    else:
        rows["train"] = _taken(data.train, data.train_split, data.train_size, data)
        if held:  # a generator has no end: it makes as many of its validation split
            rows["validation"] = load_rows(data.train, data.validation_split, held, data)
    if data.validation is not None:
        rows["validation"] = _taken(data.validation, data.validation_split, data.validation_size, data)
    if data.test is not None:
        rows["test"] = _taken(data.test, data.test_split, data.test_size, data)
    elif data.train.startswith("bundled:") or file_kind(data.train) is None:
        try:
            rows["test"] = _taken(data.train, data.test_split, data.test_size, data)
        except NoSplitError:
            pass  # many data sets have training data only
    return rows


def load_more_tests(data: DataConfig) -> dict[str, Rows]:
    """Name -> rows, of the files and Hub splits of data.more_tests."""
    made = {}
    for name, place in data.more_tests.items():
        is_file = Path(place).suffix.lower() in READERS
        made[name] = _taken(*((place, data.test_split) if is_file else (data.test or data.train, place)), data.test_size, data)
    return made


def _taken(source: str, split: str, size: int | None, data: DataConfig) -> Rows:
    """The first `size` rows, in the order of the source or in the one that data.shuffle_seed draws; what is generated
    has no order of its own.
    """
    if data.shuffle_seed is None or source.startswith("bundled:"):
        return load_rows(source, split, size, data)
    rows = load_rows(source, split, None, data)
    random.Random(f"rows {data.shuffle_seed}").shuffle(rows)
    return rows[:size]


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, source: str) -> Usable:
    """Rows as text by the template, those with an empty text left out. UserError that names the first few rows which cannot be
    rendered (a field is missing or no text), and where no row is left.
    """
    columns = columns_of(data.template, data.columns, available_columns(rows), source)
    make = TEMPLATES[data.template].render
    kept: Rows = []
    rendered: list[Rendered] = []
    empty: Counter[str] = Counter()
    mistakes: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            rendered.append(make(_by_role(row, columns), tokenizer, data.system_prompt))
            kept.append(row)
        except EmptyText as error:
            empty[error.role] += 1
        except UserError as error:
            mistakes.append(f"row {number}: {error}")
            if len(mistakes) == SHOWN_MISTAKES:
                break
    if mistakes:
        raise UserError(f"{source} has rows that template {data.template} cannot use: {'; '.join(mistakes)}")
    if empty and not rendered:
        raise UserError(f"{source} has no row that can be used: {' or '.join(empty)} is empty in all of them ({len(rows)})")
    return Usable(rows=kept, examples=rendered, empty=dict(empty))


def _by_role(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {role: row[column] for role, column in columns.items() if column in row}


def _non_empty(dataset: TokenDataset | None) -> TokenDataset | None:
    return dataset if dataset is not None and len(dataset) else None


def calibration_rows(dataset: Sized, count: int, seed: int | str) -> Sequence[int]:
    """Places of the examples that the saliency pass reads: `count` different ones, drawn by the seed."""
    count = min(count, len(dataset))
    return random.Random(f"calibration {seed}").sample(range(len(dataset)), count)
