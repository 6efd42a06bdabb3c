"""Sequence classification and regression within a run: loading, the loss, the figures; and loading a finished one.

Shape suffixes: B examples, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from speft_core.errors import UserError

from . import data, heads, models, positions, shards
from .data.labelled import LabelledCollator, LabelledDataset, Rows, encode_rows, encoder, find_columns, sentence
from .data.labels import LabelSpace, check_labels, label_space
from .data.sources import available_columns
from .data.tokens import LengthReport
from .evaluate import metrics
from .train_args import check_best

if TYPE_CHECKING:
    from .config import DataConfig
    from .context import Run

Result = dict[str, Any]
SHOWN = ("accuracy", "f1", "matthews", "pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class LabelledBundle:
    """The data of a classification run; see data.DataBundle."""

    space: LabelSpace
    train: LabelledDataset
    validation: LabelledDataset | None = None
    test: LabelledDataset | None = None
    train_rows: Rows = field(default_factory=list)
    more_tests: dict[str, LabelledDataset] = field(default_factory=dict)
    test_rows: Rows = field(default_factory=list)
    reports: dict[str, LengthReport] = field(default_factory=dict)

    def summary(self, cfg: DataConfig) -> list[str]:
        """A line a split, and one for the labels."""
        names = self.space.names
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        labels = f"labels: {len(names)} classes ({shown})" if names else "labels: numbers, one output, squared error"
        return [labels, *(sentence(report, name, cfg.max_length) for name, report in self.reports.items())]

    def collator(self, tokenizer: Any, model: Any = None) -> LabelledCollator:
        """Makes batches of these examples."""
        return LabelledCollator(tokenizer.pad_token_id, left=tokenizer.padding_side == "left")


def load_data(run: Run) -> LabelSpace:
    """The data come first: they say how many outputs the head has."""
    cfg = run.cfg
    run.tokenizer = models.load_tokenizer(cfg)
    rows = data.load_splits(cfg.data)
    more = data.load_more_tests(cfg.data)
    clash = sorted(set(more) & {"train", "validation", "test", "split", "count", "loss", *SHOWN})
    if clash:
        raise UserError(f"data.more_tests: a name must be none of the figures' and splits'; got {', '.join(clash)}")
    rows |= more
    columns = find_columns(cfg.data, available_columns(rows["train"]), cfg.data.train)
    space, said = label_space(rows["train"], columns.label, cfg.data, cfg.data.train, cfg.model.num_labels)
    unknown = check_best(cfg.train, cfg.model.task, "numbers" if space.is_regression else "classes")
    if unknown:
        raise UserError("; ".join(unknown))
    encode, sets, reports = encoder(run.tokenizer, cfg.data), {}, {}
    for name, split in rows.items():
        source = {"validation": cfg.data.validation, "test": cfg.data.test, **cfg.data.more_tests}.get(name) or cfg.data.train
        find_columns(_exactly(cfg.data, columns), available_columns(split), source)
        if name != "train":
            check_labels(split, columns.label, space, source)
        overlong = cfg.data.overlong if name == "train" else "truncate"  # no example is left out of a score
        sets[name], reports[name], words = encode_rows(split, columns, space, encode, cfg.data.max_length, overlong, source)
        said += words
    if not len(sets["train"]):
        raise UserError(
            f"data.max_length must leave at least one training example; {cfg.data.max_length} leaves none of"
            f" {len(rows['train'])}"
        )
    run.data = LabelledBundle(
        space=space, train=sets["train"], validation=sets.get("validation"), test=sets.get("test"),
        train_rows=rows["train"], test_rows=rows.get("test", []), reports=reports,
        more_tests={name: sets[name] for name in more},
    )  # fmt: skip
    for line in said:
        run.note(f"  {line}")
    return space


def load_model(run: Run, space: LabelSpace) -> None:
    """The model, with a head for these labels and room for the data that were loaded."""
    cfg, reports = run.cfg, run.data.reports
    run.model, _ = models.load_model(cfg, space, run.tokenizer, run.ranks.world)
    longest = max(report.longest for report in reports.values())
    room = positions.room(run.model)
    if room is not None and longest > room:
        raise UserError(positions.too_long(room, longest))
    run.say(f"  {heads.about(run.model, cfg)}")


def loss(outputs: Any, labels_B: torch.Tensor, num_items_in_batch: Any = None, smoothing: float = 0.0) -> torch.Tensor:
    """Mean over the examples of the whole step, also when it is accumulated from several batches.

    Cross entropy for whole-number labels, squared error for fractions. The models' own losses take the mean of each
    part of the step, which the Trainer would then add up. smoothing: of the labels of classes, where there are gradients; a
    validation measures the loss itself.
    """
    logits_BO = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    if labels_B.is_floating_point():
        each_B = (logits_BO.squeeze(-1).float() - labels_B.float()).square()
    else:
        smoothing = smoothing if torch.is_grad_enabled() else 0.0
        each_B = torch.nn.functional.cross_entropy(logits_BO.float(), labels_B, reduction="none", label_smoothing=smoothing)
    return each_B.sum() / (len(each_B) if num_items_in_batch is None else num_items_in_batch)


def trainer_metrics(space: LabelSpace) -> Any:
    """What the Trainer calls on the validation set, for early stopping and the best checkpoint."""

    def compute(prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        found = metrics.figures(prediction.label_ids.tolist(), outputs.tolist(), space.is_regression)
        # The Trainer's own mean counts the examples that fill up the ranks' last batch twice.
        whole = loss({"logits": torch.as_tensor(outputs)}, torch.as_tensor(prediction.label_ids)).item()
        return {**found, "loss": whole}

    return compute


def evaluate(run: Run, model: Any) -> Result:
    """Figures on the test data, or on the validation data where there are no test data; on both where there are both.
    Those of validation and of each of data.more_tests stand under its name.
    """
    bundle: LabelledBundle = run.data
    main = bundle.test if bundle.test is not None else bundle.validation
    assert main is not None, "measure.check_data has looked"
    figures = _figures(run, model, main)
    if bundle.test is not None and bundle.validation is not None:
        figures["validation"] = _figures(run, model, bundle.validation)
    elif bundle.test is None:
        figures["split"] = "validation"
    figures |= {name: _figures(run, model, examples) for name, examples in bundle.more_tests.items()}
    run.say("  " + ", ".join(f"{name} {figures[name]:.4f}" for name in (*SHOWN, "loss") if name in figures))
    return figures


def _figures(run: Run, model: Any, examples: LabelledDataset) -> Result:
    """Each rank scores a share of the examples; all ranks then hold all predictions."""
    settings, ranks = run.cfg.evaluate, run.ranks
    count = len(examples) if settings.limit is None else min(settings.limit, len(examples))
    mine = ranks.share(list(range(count)))
    with shards.evaluating(model, ranks):
        found = predict(
            model, [examples[i] for i in mine], run.data.collator(run.tokenizer), settings.batch_size, run.shows_progress
        )
    gathered = ranks.gather([(examples[i]["labels"], row) for i, row in zip(mine, found, strict=True)])
    pairs = [pair for part in gathered for pair in part]
    labels, outputs = [label for label, _ in pairs], [row for _, row in pairs]
    mean = loss({"logits": torch.tensor(outputs)}, torch.tensor(labels)).item()
    return {**metrics.figures(labels, outputs, run.data.space.is_regression), "loss": mean, "count": count}


@torch.no_grad()
def predict(
    model: Any, examples: Sequence[dict[str, Any]], collate: LabelledCollator, batch_size: int, progress: bool = False
) -> list[list[float]]:
    """The head's outputs for each example, in the order given; similar lengths run together."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place]["input_ids"]))
    found: list[list[float]] = [[] for _ in examples]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="classifying", unit="batch", disable=not progress):
            places = order[start : start + batch_size]
            batch = collate([examples[place] for place in places])
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            for place, row in zip(places, model(**inputs).logits.float().cpu().tolist(), strict=True):
                found[place] = row
    finally:
        model.train(training)
    return found


def load_classifier(folder: str | Path, model_name: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished run's adapter folder: the base with its head and labels, the adapter applied.

    model_name: another place of the same base. UserError for a folder that is not a sparse classification adapter.
    """
    import transformers

    import speft_core as sc

    from .config import ModelConfig

    folder = Path(folder)
    adapter = sc.SparseAdapter.load(folder)
    if adapter.config.task_type != "SEQ_CLS":
        raise UserError(f"{folder} must hold a classification adapter (SEQ_CLS); it is of type {adapter.config.task_type}")
    name = model_name or adapter.config.base_model_name_or_path
    if name is None:
        raise UserError(f"{folder} does not name its base model; give model_name")
    config = transformers.AutoConfig.from_pretrained(folder)
    where = models.locate(ModelConfig(name=name))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        where, config=config, dtype=config.dtype, ignore_mismatched_sizes=True
    )
    adapter.apply(model.eval())
    return model, transformers.AutoTokenizer.from_pretrained(where)


def _exactly(settings: DataConfig, columns: Any) -> DataConfig:
    from dataclasses import replace

    named = {role: getattr(columns, role) for role in ("text", "text_pair", "label")}
    return replace(settings, columns={role: column for role, column in named.items() if column is not None})
