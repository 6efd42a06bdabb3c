"""The train section: what early stopping and the best checkpoint need, told with the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from speft_core import UserError
from speft_train.config import RunConfig, load_config
from speft_train.config_names import FIGURES
from speft_train.evaluate import metrics

SMALL = "output_dir: out\nmodel: {name: m}\ndata: {train: d.jsonl}\nadapter: {budget: {k: 10}}\n"
EVALUATED = ["train.eval_strategy=epoch", "train.save_strategy=epoch"]
CLASSES = "model.task=sequence_classification"
BEST_BY_STEPS = ["train.eval_strategy=steps", "train.load_best_model_at_end=true"]


def config(folder: Path, *overrides: str) -> RunConfig:
    (folder / "a.yaml").write_text(SMALL)
    return load_config(folder / "a.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["train.dataloader_drop_last=false"],
            "train.dataloader_drop_last: cannot be set here: each epoch is cut into whole global",
        ),
        (
            ["train.load_best_model_at_end=true"],
            "train.load_best_model_at_end: needs train.eval_strategy epoch or steps; got no",
        ),
        (
            [*BEST_BY_STEPS, "train.save_steps=20"],
            "train.save_steps: with train.load_best_model_at_end every evaluation is saved, so it must be 10 as train.eval_steps, or",
        ),
        ([*BEST_BY_STEPS, "train.eval_steps=0.5", "train.save_steps=5"], "so it must be 0.5 as train.eval_steps, or left out"),
        (
            ["train.label_smoothing_factor=0.1", CLASSES, "data.labels=numbers"],
            "train.label_smoothing_factor: a regression has no labels to smooth, remove it; got 0.1",
        ),
        (
            ["train.early_stopping_patience=2"],
            "train.early_stopping_patience: needs train.eval_strategy epoch or steps; got no",
        ),
        (
            ["train.metric_for_best_model=accuracy"],
            "train.metric_for_best_model: must be loss, all that a causal_lm is measured",
        ),
        (["train.metric_for_best_model=eval_los"], "got 'eval_los'. Did you mean 'loss'?"),
        (
            ["train.early_stopping_patience=2", *EVALUATED],
            "early_stopping_patience: needs train.load_best_model_at_end=true, or",
        ),
        (
            ["train.metric_for_best_model=acuracy", CLASSES],
            "accuracy, f1, matthews, pearson, spearman; got 'acuracy'. Did you mean 'acc",
        ),
        (
            ["train.metric_for_best_model=eval_f1", CLASSES, "data.labels=numbers"],
            "must be one of loss, pearson, spearman; got 'eval_f1'",
        ),
        (
            ["train.metric_for_best_model=pearson", CLASSES, "data.labels=classes"],
            "must be one of loss, accuracy, f1, matthews; got",
        ),
    ],
)
def test_what_stops_early_and_what_is_best_must_be_measured(tmp_path: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        config(tmp_path, *overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.load_best_model_at_end=true"],
        ["train.metric_for_best_model=eval_loss"],
        ["train.lr_scheduler_type=reduce_lr_on_plateau"],
        ["train.metric_for_best_model=f1", CLASSES],
    ],
)
def test_what_can_stop_early_is_let_through(tmp_path: Path, overrides: list[str]) -> None:
    assert config(tmp_path, "train.early_stopping_patience=2", *EVALUATED, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.logging_steps=7", "train.save_steps=7"], ["train.save_strategy=best", "train.save_steps=20"]],
)
def test_what_saves_each_evaluation_is_let_through(tmp_path: Path, overrides: list[str]) -> None:
    assert config(tmp_path, *BEST_BY_STEPS, *overrides)


def test_the_figures_that_a_config_may_name_are_those_that_are_measured() -> None:
    assert {name: set(figures) for name, figures in FIGURES.items()} == {
        "classes": {"loss", *metrics.CLASSES},
        "numbers": {"loss", *metrics.NUMBERS},
        "auto": {"loss", *metrics.CLASSES, *metrics.NUMBERS},
    }
