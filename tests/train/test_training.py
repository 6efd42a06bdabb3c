"""The train stage: stopped at any step and started again it ends as a run that was left alone, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import callbacks, checkpoints, cli, results, stages, trainer
from speft_train.folder import RunFolder
from speft_train.ranks import Ranks
from speft_train.signals import Stopped

Execute = Callable[..., dict[str, Any]]
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
# Five steps an epoch. The worst evaluation counts as the best one: that of the first epochs, while the model still learns.
BY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 12, "greater_is_better": True, **BEST}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 8, "greater_is_better": True, **BEST}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def execute(tmp_path: Path, model: Path) -> Execute:
    """Run a config in tmp_path/NAME, keys of its train section set or (None) left out, and give its results."""

    def run(name: str = "run", *overrides: str, **train: Any) -> dict[str, Any]:
        sections = {"data": {"validation_from_train": 8}, "evaluate": {"enabled": False}}
        file = make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, train=train, **sections)
        tree = yaml.safe_load(file.read_text())
        tree["train"] = {key: value for key, value in tree["train"].items() if value is not None}
        file.write_text(yaml.safe_dump(tree))
        cli.execute(file, list(overrides), dry_run=False)
        return results.read(RunFolder(tmp_path / name))

    return run


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """RUN/CHECKPOINT of every checkpoint that was written to its end."""
    seen: list[str] = []
    mark = checkpoints.mark_complete

    def watched(folder: Path, *args: Any) -> None:
        seen.append(f"{folder.parent.name}/{folder.name}")
        mark(folder, *args)

    monkeypatch.setattr(checkpoints, "mark_complete", watched)
    return seen


def stopped(execute: Execute, step: int, *args: Any, **train: Any) -> Stopped:
    """Run with a SIGTERM that comes in that step."""
    on_step_end = callbacks.StopOnSignal.on_step_end

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.request(15, None)
        on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(callbacks.StopOnSignal, "on_step_end", signalled)
        execute(*args, **train)
    return caught.value


def died_before_save(execute: Execute, *args: Any, **train: Any) -> None:
    """Run to the end of training, and no further."""

    def dies(run: Any) -> Any:
        raise Stopped(9, "killed")

    rows = tuple(stages.Stage(**{**vars(s), "work": dies if s.name == "save" else s.work}) for s in stages.STAGES)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="killed"):
        patch.setattr(stages, "STAGES", rows)
        execute(*args, **train)


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints.complete(run)]


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for key in ("digest", "history", "steps"):
        assert left[key] == right[key], key


@pytest.mark.parametrize("step", [7, 10, 12], ids=["in an epoch", "at the end of one", "the last"])
@pytest.mark.parametrize("schedule", [{}, PLATEAU], ids=["linear", "plateau"])
def test_a_signal_adds_no_evaluation_and_one_checkpoint(
    tmp_path: Path, execute: Execute, saved: list[str], step: int, schedule: dict[str, Any]
) -> None:
    """What is due at the end of an epoch is done where the epoch ends, and nowhere else."""
    whole = execute("whole", **BY_EPOCH, **schedule)
    assert [row["step"] for row in whole["history"] if "eval_loss" in row] == [5, 10, 12]
    assert f"checkpoint-{step} is saved" in str(stopped(execute, step, "cut", **BY_EPOCH, **schedule))
    due = {5, 10, 12} & set(range(step)) | {step}
    assert [name for name in saved if name.startswith("cut")] == [f"cut/checkpoint-{n}" for n in sorted(due)]
    same(execute("cut", **BY_EPOCH, **schedule), whole)
    states = [json.loads((tmp_path / n / "checkpoint-12/trainer_state.json").read_text()) for n in ("whole", "cut")]
    assert states[0]["best_global_step"] == states[1]["best_global_step"] == 5


def test_a_signal_saves_also_where_only_the_best_is_saved(execute: Execute, tmp_path: Path) -> None:
    settings = {**BY_STEPS, "save_strategy": "best"}
    whole = execute("whole", **settings)
    assert "checkpoint-5 is saved" in str(stopped(execute, 5, "cut", **settings))
    assert names(tmp_path / "cut") == ["checkpoint-1", "checkpoint-5"]
    same(execute("cut", **settings), whole)


def test_the_newest_and_the_best_checkpoint_stay_until_the_run_is_done(tmp_path: Path, execute: Execute) -> None:
    settings = {**BY_STEPS, "save_total_limit": 1}
    whole = execute("whole", **settings)
    assert names(tmp_path / "whole") == ["checkpoint-1"]
    stopped(execute, 6, "cut", **settings)
    assert names(tmp_path / "cut") == ["checkpoint-1", "checkpoint-6"]
    died_before_save(execute, "cut", **settings)
    assert names(tmp_path / "cut") == ["checkpoint-1", "checkpoint-8"]
    same(execute("cut", **settings), whole)
    assert names(tmp_path / "cut") == ["checkpoint-1"]


def test_early_stopping_counts_on_after_a_stop(execute: Execute) -> None:
    settings = {**BY_STEPS, "early_stopping_patience": 3}
    whole = execute("whole", **settings)
    assert whole["steps"] == 4  # the first evaluation counts as the best
    stopped(execute, 3, "cut", **settings)
    same(execute("cut", **settings), whole)


@pytest.mark.parametrize("rest", [{}, {"load_best_model_at_end": False}], ids=["best", "last"])
def test_a_run_that_stopped_early_is_not_trained_further(execute: Execute, rest: dict[str, Any]) -> None:
    """Whatever ends it between training and saving."""
    settings = {**BY_STEPS, "early_stopping_patience": 3, **rest}
    whole = execute("whole", **settings)
    died_before_save(execute, "dead", **settings)
    same(execute("dead", **settings), whole)
    stopped(execute, 4, "cut", **settings)
    same(execute("cut", **settings), whole)


def remade(folder: Path, **record: Any) -> None:
    """Let the checkpoint be of a run with other figures; None takes one away, as in an older version's."""
    before = json.loads((folder / checkpoints.MARKER).read_text())
    marker = {key: value for key, value in {**before, **record}.items() if value is not None}
    (folder / checkpoints.MARKER).write_text(json.dumps(marker))


UNSET = {"global_batch_size": None}
ADVICE: list[tuple[dict[str, Any], int, str, list[str]]] = [
    ({}, 4, "1 process makes it 8", ["train.global_batch_size=4"]),
    (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 16, "1 process makes it 8",
        ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4"],
    ),
    (
        {"per_device_train_batch_size": 8}, 2, "1 process makes it 8",
        ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("train", "theirs", "made", "advice"), ADVICE)
def test_another_global_batch_is_refused_with_what_makes_it_equal(
    tmp_path: Path, execute: Execute, train: dict[str, Any], theirs: int, made: str, advice: list[str]
) -> None:
    """As a start with another number of processes would make it where train.global_batch_size is not set."""
    stopped(execute, 2, "run", **UNSET, **train)
    remade(tmp_path / "run/checkpoint-2", global_batch=theirs)
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file() and f.name != "stages.json"}
    with pytest.raises(UserError, match=f"checkpoint-2 was made with {theirs} examples a step, {made}") as error:
        execute("run", **UNSET, **train)
    assert f"set {' '.join(advice)}" in str(error.value) and "\n" not in str(error.value)
    assert all(f.read_bytes() == content for f, content in before.items())
    assert execute("run", *advice, **UNSET, **train)["global_batch_size"] == theirs
    same(execute("run", *advice, **UNSET, **train), results.read(RunFolder(tmp_path / "run")))


def test_a_batch_that_means_the_same_goes_on(tmp_path: Path, execute: Execute) -> None:
    """Said otherwise, it is still the same run; before anything was trained only the same words are."""
    whole = execute("whole", **UNSET)
    stopped(execute, 3, "cut", **UNSET)
    with pytest.raises(UserError, match="train.global_batch_size is not set there and 16 here"):
        execute("cut", global_batch_size=16)
    same(execute("cut", global_batch_size=8), whole)
    with pytest.raises(UserError, match="train.global_batch_size is 8 there and not set here"):  # finished, and perhaps tidied up
        execute("cut", **UNSET)


def test_training_data_of_another_size_are_refused(tmp_path: Path, execute: Execute) -> None:
    settings = {"max_steps": None, "num_train_epochs": 2}
    stopped(execute, 3, "run", **settings)
    remade(tmp_path / "run/checkpoint-3", steps=20)
    with pytest.raises(UserError, match="checkpoint-3 is of a run of 20 steps; .* make 10") as error:
        execute("run", **settings)
    assert "\n" not in str(error.value)
    remade(tmp_path / "run/checkpoint-3", steps=10)
    assert execute("run", **settings)["steps"] == 10


def test_a_checkpoint_that_says_nothing_of_its_batch_goes_on(tmp_path: Path, execute: Execute) -> None:
    whole = execute("whole")
    stopped(execute, 3, "cut")
    remade(tmp_path / "cut/checkpoint-3", global_batch=None, steps=None)
    assert json.loads((tmp_path / "cut/checkpoint-3/COMPLETE").read_text()) == {"engine": "torch"}
    same(execute("cut"), whole)


def test_a_gradient_scaler_goes_on_where_it_was(tmp_path: Path, execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.fp16 needs a GPU, its scaler does not; a power of two changes no bit of float32 gradients."""
    made = trainer.RunTrainer.__init__

    def scaling(self: Any, **kwargs: Any) -> None:
        made(self, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)

    monkeypatch.setattr(trainer.RunTrainer, "__init__", scaling)
    execute("whole")
    stopped(execute, 3, "cut")
    execute("cut")
    states = [torch.load(tmp_path / name / "checkpoint-6/scaler.pt") for name in ("whole", "cut")]
    assert states[0]["scale"] == 16.0 and states[0] == states[1]
    shutil.rmtree(tmp_path / "cut")


def test_gradients_that_overflow_while_a_scale_is_searched_end_no_run(
    tmp_path: Path, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their steps are skipped and the scale is halved, here twice."""

    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            return super().scale(outputs) * (float("inf") if self.get_scale() > 2.0 else 1.0)

    made = trainer.RunTrainer.__init__

    def scaling(self: Any, **kwargs: Any) -> None:
        made(self, **kwargs)
        self.accelerator.scaler = Scaler("cpu", init_scale=8.0)

    monkeypatch.setattr(trainer.RunTrainer, "__init__", scaling)
    found = execute(save_strategy="no")
    assert ["grad_norm" in row for row in found["history"]] == [False, False, True, True, True, True]
    assert all(row["loss"] < 10 for row in found["history"])
    text = (tmp_path / "run/results.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    ended = callbacks.FiniteLoss(Ranks(), lambda step: [7], lambda: True)
    with pytest.raises(UserError, match=r"loss is inf at step 3 of 9 \(training examples 7\)"):
        args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(global_step=3, max_steps=9)
        ended.on_log(args, state, TrainerControl(), {"loss": float("inf")})
