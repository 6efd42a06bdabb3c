"""What a run measures and on which rows: the test data, or the validation data where there are none.

That there is nothing to measure is told from the config alone where it can be, else when the data are read: the model may take
long to load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speft_core.errors import UserError

from . import shards
from .config import DataConfig, RunConfig
from .context import Run

if TYPE_CHECKING:
    from .data.templates import Rendered

Result = dict[str, Any]
SHOWN = ("exact_match", "exact_match_last_number", "accuracy", "accuracy_per_character", "loss")
NOTHING, OFF = "evaluate has nothing to measure", ", or evaluate.enabled=false"


@dataclass(frozen=True)
class Split:
    """Data that are measured. Each rank takes its share of what was rendered and tokenized for all."""

    name: str
    rows: list[dict[str, Any]]
    rendered: list[Rendered]  #: the rows as text
    examples: Any  #: the tokenized ones that are not too long, or None


def may_test(data: DataConfig) -> bool:
    """Whether there may be test data: a file is training data alone, any other source may have a split of them."""
    from .data.sources import READERS

    return data.test is not None or Path(data.train).suffix.lower() not in READERS


def check_config(cfg: RunConfig) -> None:
    """UserError where no data could give a figure."""
    settings, data = cfg.evaluate, cfg.data
    if not settings.enabled:
        return
    by_template = data.template == "multiple_choice" or cfg.model.task == "sequence_classification"
    if not (by_template or settings.generation or settings.loss):
        raise UserError(f"{NOTHING}: set one of evaluate.generation and evaluate.loss{OFF}")
    if settings.validation and data.validation is None and not data.validation_from_train:
        raise UserError("evaluate.validation needs data.validation or data.validation_from_train; neither is set")
    held_out = data.validation is not None or data.validation_from_train > 0
    if not held_out and not may_test(data):
        raise UserError(
            f"{NOTHING}: the file {data.train} is training data alone; set data.test, data.validation or"
            f" data.validation_from_train{OFF}"
        )


def check_data(run: Run) -> None:
    """UserError where the data that were read give no figure."""
    cfg, bundle = run.cfg, run.data
    if cfg.model.task == "sequence_classification":
        if bundle.test is None and bundle.validation is None:
            raise UserError(_no_rows(cfg))
        return
    from . import evaluate

    measured = splits(run, cfg.evaluate.validation)
    if not measured[0].rows:
        raise UserError(_no_rows(cfg))
    if cfg.data.template == "multiple_choice":
        return
    for split in measured:
        if cfg.evaluate.generation:
            evaluate.references(split.rendered[: cfg.evaluate.limit])
        elif split.examples is None:
            raise UserError(
                f"{NOTHING}: every {split.name} example is longer than data.max_length ({cfg.data.max_length}); raise it{OFF}"
            )


def figures(run: Run, model: Any, validation: bool = False) -> Result:
    """All figures of a model as it stands. Each rank takes a share of the rows; `split` is there where it is not test.
    `validation`: those of the validation data too, under this name, where test data are what is measured.
    """
    from . import classification

    if run.cfg.model.task == "sequence_classification":
        return classification.evaluate(run, model)
    split, *beside = splits(run, validation)
    found = _of_split(run, model, split)
    if split.name != "test":
        found["split"] = split.name
    found |= {other.name: _of_split(run, model, other) for other in beside}
    run.say("  " + ", ".join(f"{name} {found[name]:.4f}" for name in SHOWN if name in found))
    return found


def _of_split(run: Run, model: Any, split: Split) -> Result:
    found = _answers(run, model, split)
    if run.cfg.evaluate.loss and split.examples is not None:
        found = {**_loss(run, model, split.examples), **found}
    return found


def splits(run: Run, validation: bool = False) -> list[Split]:
    """What is measured of a causal model: the test data, and the validation data in their place where there are none, or beside
    them with `validation`.
    """
    bundle = run.data
    test = Split("test", bundle.test_rows, bundle.test_examples, bundle.test)
    held = Split("validation", bundle.validation_rows, bundle.validation_examples, bundle.validation)
    if not test.rows:
        return [held]
    return [test, held] if validation and held.rows else [test]


def _no_rows(cfg: RunConfig) -> str:
    return (
        f"{NOTHING}: {cfg.data.train} has no split {cfg.data.test_split!r}; set data.test, data.test_split, data.validation or"
        f" data.validation_from_train{OFF}"
    )


def _answers(run: Run, model: Any, split: Split) -> Result:
    """Likelihoods of choices, or exact match of what is generated."""
    from . import evaluate

    measure: Any
    wanted: list[Any]
    settings, ranks = run.cfg.evaluate, run.ranks
    if run.cfg.data.template == "multiple_choice":
        measure, wanted = evaluate.choose, split.rows
    elif settings.generation:
        measure, wanted = evaluate.generate_exact_match, split.rendered
    else:
        return {}
    mine: list[Any] = ranks.share(wanted[: settings.limit])
    with shards.evaluating(model, ranks):
        found = measure(model, run.tokenizer, mine, run.cfg, progress=run.shows_progress) if mine else {}
    return mean(ranks.gather(found), "count")


def _loss(run: Run, model: Any, examples: Any) -> Result:
    from . import data, evaluate, label_rows

    settings, ranks = run.cfg.evaluate, run.ranks
    count = len(examples) if settings.limit is None else min(settings.limit, len(examples))
    part = [examples[i] for i in ranks.share(list(range(count)))]
    found: Result = {}
    with shards.evaluating(model, ranks):
        if part:
            ids, labels = [e["input_ids"] for e in part], [e["labels"] for e in part]
            mine = data.TokenDataset(ids, [[label != label_rows.IGNORED for label in row] for row in labels])
            collate = data.collator(run.tokenizer, model)
            found = evaluate.held_out_loss(model, mine, collate, settings.batch_size, progress=run.shows_progress)
    made = mean(ranks.gather(found), "tokens")
    return {**made, "perplexity": math.exp(min(made["loss"], 700.0)), "count": count}


def mean(parts: list[Result], weight: str) -> Result:
    """The ranks' figures as one: means weighted by what each has counted, their sum, the first rank's examples."""
    parts = [part for part in parts if part.get(weight)]
    total = sum(part[weight] for part in parts)
    made: Result = {weight: total}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "seconds":
            made[name] = max(values)
        elif isinstance(values[0], float):
            made[name] = sum(v * part[weight] for v, part in zip(values, parts, strict=True)) / total
        elif name != weight:
            made[name] = values[0]
    return made
