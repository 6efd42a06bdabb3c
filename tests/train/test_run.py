"""Whole runs on a pico model, in one process: what lies in the folder, what is reused, resume, and the other methods."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import speft_core as sc
from pico_run import make_config, make_model
from speft_train import checkpoints, cli, results, scoring, stages
from speft_train.folder import RunFolder
from speft_train.signals import Stopped

CONTRACT = (
    "base", "adapted", "trainable_parameters", "total_parameters", "adapter_bytes", "saliency_seconds", "train_seconds",
    "peak_memory_bytes", "seed", "steps",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def execute(tmp_path: Path, model: Path) -> Callable[..., dict[str, Any]]:
    """Run a config in tmp_path/NAME and give its results."""

    def run(name: str = "run", *overrides: str, **sections: Any) -> dict[str, Any]:
        config = make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, **sections)
        cli.execute(config, list(overrides), dry_run=False)
        return results.read(RunFolder(tmp_path / name))

    return run


def losses(found: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in found["history"] if "loss" in row]


def test_a_run_leaves_everything_and_a_second_one_reuses_it(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], worked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = execute()
    assert worked == ["load", "base", "mask", "attach", "train", "save", "evaluate", "report"]
    assert all(found[key] is not None for key in CONTRACT)
    assert found["steps"] == 6 and len(losses(found)) == 6
    assert losses(found)[-1] < losses(found)[0]
    assert found["adapted"]["loss"] < found["base"]["loss"]
    assert found["trainable_parameters"] == round(0.05 * found["total_parameters"])
    run = tmp_path / "run"
    for name in (
        *("config.yaml", "mask.safetensors", "results.json", "report.md", "loss.png", "density.png"),
        *("checkpoint-6/COMPLETE", "checkpoint-6/trainable.safetensors", "adapter/adapter_config.json"),
        *("adapter/adapter_model.safetensors", "adapter/config.json", "adapter/README.md"),
        "adapter/training_config.yaml",
    ):
        assert (run / name).stat().st_size > 0, name
    assert any((run / "tensorboard").iterdir())
    assert found["adapter_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert "exact match" in (run / "adapter" / "README.md").read_text()
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
    capsys.readouterr()
    worked.clear()
    assert execute() == found
    assert worked == []
    assert "save: reused from" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()} == before


def test_what_is_missing_is_made_again_and_no_more(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], worked: list[str]
) -> None:
    found = execute()
    worked.clear()
    again = execute("run", "evaluate.limit=2")
    assert worked == ["load", "base", "evaluate", "report"]
    assert again["adapted"]["count"] == 2 and again["digest"] == found["digest"]
    worked.clear()
    (tmp_path / "run" / "report.md").unlink()
    execute("run", "evaluate.limit=2")
    assert worked == ["report"]


def test_the_checkpoint_holds_no_frozen_weight(tmp_path: Path, execute: Callable[..., dict[str, Any]]) -> None:
    found = execute()
    folder = tmp_path / "run" / "checkpoint-6"
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert size < 14 * found["trainable_parameters"] + 100_000
    tensors = (folder / "trainable.safetensors").stat().st_size
    assert tensors < 4 * found["trainable_parameters"] + 4096


def test_the_adapter_is_what_was_evaluated(tmp_path: Path, model: Path, execute: Callable[..., dict[str, Any]]) -> None:
    """Its values, on a freshly loaded base, give the loss of results.json; taken off, the base's."""
    from speft_train import config, data, evaluate, models

    found = execute()
    cfg = config.load_config(tmp_path / "run" / "config.yaml")
    base, tokenizer = models.load_model(cfg)
    bundle = data.build(cfg, tokenizer)
    assert bundle.test is not None
    collate = data.collator(tokenizer, base)
    adapter = sc.SparseAdapter.load(tmp_path / "run" / "adapter")
    assert adapter.config.task_type == "CAUSAL_LM" and adapter.config.base_model_name_or_path == str(model)
    with adapter.applied(base):
        loss = evaluate.held_out_loss(base, bundle.test, collate, 4, progress=False)["loss"]
    assert loss == pytest.approx(found["adapted"]["loss"], rel=1e-6)
    loss = evaluate.held_out_loss(base, bundle.test, collate, 4, progress=False)["loss"]
    assert loss == pytest.approx(found["base"]["loss"], rel=1e-6)


def test_stopping_and_going_on_ends_at_the_same_values(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in step 7 of 9, in the middle of the second epoch of five steps."""
    from speft_train import callbacks

    whole = execute("whole", train={"max_steps": 9})
    on_step_end = callbacks.StopOnSignal.on_step_end

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            self.request(15, None)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopOnSignal, "on_step_end", signalled)
        with pytest.raises(Stopped, match="stopped after step 7 of 9; checkpoint-7 is saved") as stopped:
            execute("cut", train={"max_steps": 9})
    assert stopped.value.exit_code == 143
    assert (tmp_path / "cut" / "checkpoint-7" / "COMPLETE").is_file()
    assert not (tmp_path / "cut" / "adapter").exists()
    (tmp_path / "cut" / "checkpoint-8").mkdir()  # what a kill in mid-save leaves
    cut = execute("cut", train={"max_steps": 9})
    assert cut["digest"] == whole["digest"]
    assert losses(cut) == losses(whole)
    assert cut["steps"] == 9
    assert (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_signals_after_the_last_step_end_the_run_once_and_are_told(
    tmp_path: Path,
    execute: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    strategy: str,
) -> None:
    """The first comes when no step is left to ask for it; a launcher's second one while the run ends, and a third after."""
    from speft_train import callbacks

    def late(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    finish, tell = RunFolder.finish, cli._print

    def second(self: RunFolder, stage: str, key: str, result: dict[str, Any], *read: Any) -> None:
        if key == "unfinished":
            os.kill(os.getpid(), signal.SIGTERM)
        finish(self, stage, key, result, *read)

    def third(message: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        tell(message)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopOnSignal, "on_train_end", late)
        patch.setattr(RunFolder, "finish", second)
        patch.setattr(cli, "_print", third)
        assert cli.guarded(lambda: execute(train={"save_strategy": strategy})) == 143
    rest = "checkpoint-6 is saved, the same command goes on" if strategy == "steps" else "no checkpoint was written"
    assert f"stopped after step 6 of 6; {rest}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()
    found = execute(train={"save_strategy": strategy})
    assert found["steps"] == 6 and len(losses(found)) == 6


def test_a_kill_between_training_and_saving_costs_no_step(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def killed(run: Any) -> Any:
            raise Stopped(9, "killed")

        patch.setattr(
            stages,
            "STAGES",
            tuple(stages.Stage(**{**vars(s), "work": killed if s.name == "save" else s.work}) for s in stages.STAGES),
        )
        with pytest.raises(Stopped):
            execute()
    trained = RunFolder(tmp_path / "run").result("train")
    found = execute()
    assert found["digest"] == trained["digest"]
    assert found["steps"] == 6 and losses(found) == [row["loss"] for row in trained["history"]]


def test_a_checkpoint_of_another_engine_starts_warm_and_says_so(tmp_path: Path, execute: Callable[..., dict[str, Any]]) -> None:
    """The values, the schedule and the position are taken over; only Adam's moments start anew."""
    whole = execute(evaluate={"enabled": False})
    checkpoints.mark_complete(tmp_path / "run" / "checkpoint-4", {"engine": "deepspeed", "zero_stage": 2, "world_size": 2})
    scheduler = tmp_path / "run" / "checkpoint-4" / "scheduler.pt"
    state = torch.load(scheduler, weights_only=True)
    torch.save({**state, "base_lrs": state["base_lrs"][:1], "_last_lr": state["_last_lr"][:1]}, scheduler)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    warm = execute(evaluate={"enabled": False})
    report = (tmp_path / "run" / "report.md").read_text()
    assert "resumed from checkpoint-4" in report
    assert "warm start: checkpoint-4 was made by engine deepspeed, zero_stage 2, world_size 2" in report
    assert losses(warm)[:5] == pytest.approx(losses(whole)[:5], abs=1e-6)
    rates = [[row["learning_rate"] for row in found["history"]] for found in (warm, whole)]
    assert rates[0] == pytest.approx(rates[1])
    assert warm["steps"] == 6 and warm["digest"] != whole["digest"]


def test_same_seed_same_run_other_seed_other_run(execute: Callable[..., dict[str, Any]]) -> None:
    light = {"evaluate": {"enabled": False}}
    first, again, other = (execute("first", **light), execute("again", **light), execute("other", seed=1, **light))
    assert first["digest"] == again["digest"] != other["digest"]
    assert losses(first) == losses(again) != losses(other)
    assert first["base"] is None and first["adapted"] is None


def test_losses_do_not_depend_on_how_a_batch_is_cut(execute: Callable[..., dict[str, Any]]) -> None:
    whole, *cuts = (
        losses(execute(f"micro{size}", train={"per_device_train_batch_size": size}, evaluate={"enabled": False}))
        for size in (8, 4, 1)
    )
    for cut in cuts:
        assert cut == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_train_save_and_resume(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], worked: list[str], method: str
) -> None:
    sections = {"adapter": {"method": method, "targets": ["q_proj", "v_proj"]}, "train": {"learning_rate": 1e-2}}
    found = execute(**sections)
    assert "mask" not in worked
    assert found["adapted"]["loss"] < found["base"]["loss"]
    assert found["saliency_seconds"] is None
    share = found["trainable_parameters"] / found["total_parameters"]
    assert share == 1 if method == "full" else 0.01 < share <= 0.05
    assert (tmp_path / "run" / "adapter" / "config.json").is_file()
    worked.clear()
    again = execute("run", "evaluate.limit=3", **sections)
    assert worked == ["load", "base", "evaluate", "report"]
    assert again["adapted"]["count"] == 3
    assert again["adapted"]["loss"] < again["base"]["loss"]


def test_bfloat16_weights_keep_float32_values_and_ship_bfloat16(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    config = make_config(
        tmp_path / "c.yaml", model, tmp_path / "run", model={"dtype": "bfloat16"}, evaluate={"generation": False}
    )
    cli.execute(config, [], dry_run=False)
    found = results.read(RunFolder(tmp_path / "run"))
    assert losses(found)[-1] < losses(found)[0]
    import safetensors.torch

    state = safetensors.torch.load_file(tmp_path / "run" / "checkpoint-6" / "trainable.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    adapter = sc.SparseAdapter.load(tmp_path / "run" / "adapter")
    assert {d.values_K.dtype for d in adapter.deltas.values()} == {torch.bfloat16}


def test_activation_checkpointing_clipping_and_a_ready_mask(tmp_path: Path, execute: Callable[..., dict[str, Any]]) -> None:
    light = {"evaluate": {"enabled": False}}
    plain = execute("plain", **light)
    ready = str(tmp_path / "plain" / "mask.safetensors")
    again = execute("again", train={"activation_checkpointing": True}, adapter={"mask": ready}, **light)
    assert losses(again) == pytest.approx(losses(plain), abs=1e-5)
    clipped = execute("clipped", train={"max_grad_norm": 1e-6, "adam_epsilon": 1.0, "optim": "sgd"}, **light)
    assert abs(losses(clipped)[0] - losses(plain)[0]) < 1e-5
    assert clipped["digest"] != plain["digest"]
    assert all(row["grad_norm"] > 1e-3 for row in clipped["history"] if "grad_norm" in row)


def test_random_masks_read_no_data_and_dense_parts_are_trained(
    tmp_path: Path, execute: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "calibration", lambda *_: pytest.fail("a random mask read calibration data"))
    sections = {"metric": "random", "train_dense": ["model.norm"]}
    found = execute(adapter=sections, evaluate={"enabled": False})
    k = round(0.05 * found["total_parameters"])
    assert found["trainable_parameters"] == k + 16
    adapter = sc.SparseAdapter.load(tmp_path / "run" / "adapter")
    assert list(adapter.dense) == ["model.norm.weight"]


def test_a_loss_that_is_not_finite_ends_the_run(execute: Callable[..., dict[str, Any]]) -> None:
    where = r"at step \d+ of 6 \(training examples [\d, ]+\)"
    with pytest.raises(sc.UserError, match=rf"(loss|grad_norm) is (nan|inf) {where}; lower train.learning_rate"):
        execute(train={"learning_rate": 1e30, "max_grad_norm": 0.0}, evaluate={"enabled": False})


def test_validation_loss_is_logged_and_plotted(execute: Callable[..., dict[str, Any]]) -> None:
    found = execute(
        data={"validation_from_train": 8}, train={"eval_strategy": "steps", "eval_steps": 3}, evaluate={"enabled": False}
    )
    assert [row["step"] for row in found["history"] if "eval_loss" in row] == [3, 6]


def test_results_json_is_plain_json(tmp_path: Path, execute: Callable[..., dict[str, Any]]) -> None:
    execute(evaluate={"enabled": False})
    text = (tmp_path / "run" / "results.json").read_text()
    assert "NaN" not in text and set(CONTRACT) <= set(json.loads(text))
