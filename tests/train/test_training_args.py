"""TrainingArguments of a run: one process uses one device, however many there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments, integrations

from pico_run import make_config, make_model
from speft_core.errors import UserError
from speft_train import cli, config, results, training_args
from speft_train.folder import RunFolder
from speft_train.ranks import Ranks


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Trainer asks for their number says eight; none can be used, so the model stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.usefixtures("eight_gpus")
def test_one_process_is_not_spread_over_all_gpus(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=False, per_device_train_batch_size=4)
    assert plain.n_gpu == 8 and plain.train_batch_size == 32  # what there would be to mend
    cfg = config.load_config(make_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run", train={"use_cpu": False}))
    made = training_args.build(cfg, Ranks(), tmp_path)
    assert made.n_gpu == 1
    assert made.train_batch_size == made.per_device_train_batch_size == made.eval_batch_size == 8
    assert made.n_gpu == 1 and made.device.type == "cpu"


def test_gpus_that_stay_idle_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with how to use them; nothing where there are none, or where processes were launched."""
    cfg = config.load_config(make_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run"))
    assert training_args.idle_gpus(cfg, 1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, said in ((1, False), (8, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        line = training_args.idle_gpus(cfg, 1)
        assert (line is not None) == said
    assert line is not None and "7 more stay idle" in line and "deepspeed --num_gpus 8 " in line and "\n" not in line
    assert training_args.idle_gpus(cfg, 2) is None
    on_cpu = config.load_config(tmp_path / "c.yaml", ["train.use_cpu=true"])
    assert training_args.idle_gpus(on_cpu, 1) is None


def test_a_run_on_a_host_with_several_gpus_is_the_run_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")

    def run(name: str, **train: Any) -> dict[str, Any]:
        file = make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, train=train, evaluate={"enabled": False})
        cli.execute(file, [], dry_run=False)
        return results.read(RunFolder(tmp_path / name))

    one = run("one")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    eight = run("eight", use_cpu=False, dataloader_pin_memory=False)
    assert eight["digest"] == one["digest"] and eight["history"] == one["history"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wandd", "no tracker that transformers knows. Did you mean 'wandb'?"),
        (["tensorboard", "clearml"], "clearml is not installed; installed: tensorboard"),
    ],
)
def test_a_tracker_that_cannot_be_told_is_refused_before_anything_is_loaded(tmp_path: Path, given: Any, message: str) -> None:
    cfg = config.load_config(make_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run", train={"report_to": given}))
    with pytest.raises(UserError) as told:
        training_args.check(cfg, 1)
    assert message in str(told.value) and str(told.value).count("tensorboard") == 1


def test_other_trackers_are_told_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the Trainer alone: report_to names them, and TensorBoard's file is the run's own."""
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            told.append(logs)

    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    model = make_model(tmp_path / "model")
    losses = {}
    for name, report_to in (("one", "wandb"), ("two", ["tensorboard", "wandb"]), ("none", "none"), ("usual", "tensorboard")):
        told.clear()
        sections = {"train": {"max_steps": 2, "report_to": report_to}, "evaluate": {"enabled": False}}
        cli.execute(make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, **sections), [], dry_run=False)
        losses[name] = [logs["loss"] for logs in told if "loss" in logs]
        assert (tmp_path / name / "tensorboard").exists() == ("tensorboard" in report_to)
    assert len(losses["one"]) == 2 and losses["one"] == losses["two"] and not losses["none"] and not losses["usual"]
