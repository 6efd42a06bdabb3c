"""What ships as the best was measured and saved, whatever the config leaves out and however the run was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pico_run import make_config, make_model
from speft_core.errors import UserError
from speft_train import callbacks, checkpoints, cli, config, results, training_args
from speft_train.folder import RunFolder
from speft_train.ranks import Ranks
from speft_train.signals import Stopped

Execute = Callable[..., dict[str, Any]]
LIGHT: dict[str, Any] = {"data": {"validation_from_train": 9}, "evaluate": {"enabled": False}}
MEASURED = {"generation": False, "base": False, "validation": True}
# Of the evaluations at 3, 6, 9 and 10 the first is the worst, which counts as the best here.
BEST = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True, "max_steps": 10}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def execute(tmp_path: Path, model: Path) -> Execute:
    """Run a config in tmp_path/NAME whose save_steps is left out unless it is given, and give its results."""

    def run(name: str = "run", evaluate: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
        sections = {**LIGHT, "evaluate": evaluate or LIGHT["evaluate"], "train": train}
        file = make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, **sections)
        if "save_steps" not in train:
            without(file, "save_steps")
        cli.execute(file, [], dry_run=False)
        return results.read(RunFolder(tmp_path / name))

    return run


def without(file: Path, *keys: str) -> None:
    """Leave keys out of the train section."""
    tree = yaml.safe_load(file.read_text())
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in keys}
    file.write_text(yaml.safe_dump(tree))


def evaluated(found: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in found["history"] if "eval_loss" in row}


def signalled(execute: Execute, step: int, *args: Any, **train: Any) -> None:
    """Run with a SIGTERM that comes in that step."""
    on_step_end = callbacks.StopOnSignal.on_step_end

    def watched(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.request(15, None)
        on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(callbacks.StopOnSignal, "on_step_end", watched)
        execute(*args, **train)


def test_each_evaluation_is_saved_where_the_best_one_ships(tmp_path: Path, execute: Execute) -> None:
    """Without save_steps, whose default lies far behind the first evaluations."""
    found = execute(**BEST, learning_rate=0.05)
    losses = evaluated(found)
    assert list(losses) == [3, 6, 9, 10]
    best = max(losses, key=lambda step: losses[step])
    assert best < 10
    state = checkpoints.state(tmp_path / "run/checkpoint-10")
    assert state["best_global_step"] == best and Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert checkpoints.shipped(tmp_path / "run/checkpoint-10", best=True).name == f"checkpoint-{best}"


def test_early_stopping_by_our_defaults_ships_the_best(tmp_path: Path, execute: Execute) -> None:
    train = {"eval_strategy": "steps", "load_best_model_at_end": True, "early_stopping_patience": 1, "greater_is_better": True}
    found = execute(**train, logging_steps=2, max_steps=12, metric_for_best_model="eval_loss")
    assert list(evaluated(found)) == [2, 4] and found["steps"] == 4
    assert checkpoints.shipped(tmp_path / "run/checkpoint-4", best=True).name == "checkpoint-2"


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_signal_makes_no_other_checkpoint_the_best(tmp_path: Path, execute: Execute, step: int) -> None:
    whole = execute("whole", **BEST)
    signalled(execute, step, "cut", **BEST)
    cut = execute("cut", **BEST)
    assert (cut["digest"], cut["history"]) == (whole["digest"], whole["history"])
    best = [checkpoints.state(tmp_path / name / "checkpoint-10")["best_global_step"] for name in ("whole", "cut")]
    assert best[0] == best[1] and best[0] < 10


def test_changed_intervals_hold_from_the_checkpoint_on(tmp_path: Path, execute: Execute) -> None:
    """A checkpoint's state has those of the start that wrote it."""
    signalled(execute, 2, logging_steps=1, save_steps=5, max_steps=8)
    found = execute(logging_steps=3, save_steps=4, save_total_limit=9, max_steps=8)
    assert [row["step"] for row in found["history"] if "loss" in row] == [1, 2, 3, 6]
    assert [folder.name for folder in checkpoints.complete(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]


def test_save_steps_follow_only_where_they_must(tmp_path: Path, model: Path) -> None:
    def built(**train: Any) -> Any:
        file = make_config(tmp_path / "c.yaml", model, tmp_path / "run", **LIGHT)
        without(file, "save_steps", "logging_steps")
        overrides = [f"train.{key}={value}" for key, value in train.items()]
        made = training_args.build(config.load_config(file, overrides), Ranks(), tmp_path)
        return made.save_steps, made.eval_steps

    by_steps = {"eval_strategy": "steps", "load_best_model_at_end": "true"}
    assert built() == (200, None) and built(eval_strategy="steps") == (200, 10)
    assert built(**by_steps) == (10, 10) and built(**by_steps, logging_steps=7) == (7, 7)
    assert built(**by_steps, eval_steps=0.25) == (0.25, 0.25) and built(**by_steps, eval_steps=5, save_steps=5) == (5, 5)
    assert built(**by_steps, save_strategy="best", save_steps=50) == (50, 10)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("train", [{}, {"label_smoothing_factor": 0.2}], ids=["plain", "smoothed"])
def test_the_validation_loss_is_the_measured_one_at_any_batch_size(execute: Execute, size: int, train: dict[str, Any]) -> None:
    """Nine answers of different lengths, the last in a batch of its own; labels are smoothed for training alone."""
    found = execute(eval_strategy="epoch", max_steps=2, per_device_eval_batch_size=size, evaluate=MEASURED, **train)
    measured = found["adapted"]["validation"]
    assert measured["count"] == 9 and measured["tokens"] % 9
    assert evaluated(found) == {2: pytest.approx(measured["loss"], abs=2e-6)}


def test_a_save_that_misses_an_evaluation_is_refused(execute: Execute) -> None:
    with pytest.raises(UserError, match="train.save_steps: .* it must be 3 as train.eval_steps, or left out .*; got 4"):
        execute(**BEST, save_steps=4)
