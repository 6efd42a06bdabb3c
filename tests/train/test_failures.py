"""A loss that is not finite names the step and its examples; out of memory names the stage and what to lower."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pico_run import make_config, make_model
from speft_train import cli, label_rows
from speft_train.sampler import GlobalBatches

label_rows_loss = label_rows.next_token_loss


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"logging_steps": 6}, "loss"), ({"logging_steps": 6, "eval_strategy": "steps", "eval_steps": 5}, "loss"),
     ({"logging_steps": 9}, "train_loss"), ({"logging_strategy": "no"}, "train_loss")],
)  # fmt: skip
def test_a_loss_that_is_not_finite_names_step_and_examples(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any], name: str,
) -> None:  # fmt: skip
    """The loss goes wrong at step 4 of 6: with its log after a validation, and after the last log, too."""
    calls, loss_of = [0], label_rows.next_token_loss

    def breaks(*args: object, **kwargs: object) -> torch.Tensor:
        loss: torch.Tensor = loss_of(*args, **kwargs)  # type: ignore[arg-type]
        if args[0] is not args[1] or kwargs or len(args) > 3:  # training, not scoring
            calls[0] += 1
        return loss * float("nan") if calls[0] == 4 else loss

    monkeypatch.setattr(label_rows, "next_token_loss", breaks)
    config = make_config(
        tmp_path / "c.yaml", model, tmp_path / "run", train={**settings, "save_strategy": "no"}, data={"validation_from_train": 8},
        adapter={"metric": "magnitude"}, evaluate={"enabled": False},
    )  # fmt: skip
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    told = one_line(capsys)
    examples = ", ".join(map(str, GlobalBatches(40, 8, 0).examples_of(4)))
    assert f"error: {name} is nan at step 4 of 6 (training examples {examples})" in told


def test_values_that_are_not_finite_are_not_saved_by_the_next_try_either(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint holds them: the same command finds training over."""
    monkeypatch.setattr(label_rows, "next_token_loss", lambda *args: 0.0 * math.inf * label_rows_loss(*args))
    config = make_config(
        tmp_path / "c.yaml", model, tmp_path / "run", train={"logging_steps": 9}, adapter={"metric": "magnitude"},
        evaluate={"enabled": False},
    )  # fmt: skip
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    assert "train_loss is nan at step 1 of 6" in one_line(capsys)
    assert (tmp_path / "run/checkpoint-6/COMPLETE").is_file()
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    assert "is not finite after training, so nothing is saved" in one_line(capsys)
    assert not (tmp_path / "run/adapter").exists()


def test_examples_of_a_step_are_those_of_the_order() -> None:
    order = GlobalBatches(21, 4, seed=3)
    for step in range(1, 12):
        epoch, place = divmod(step - 1, 5)
        assert order.examples_of(step) == order.order(epoch)[4 * place : 4 * place + 4]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_names_a_micro_batch(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(*args: object, **kwargs: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(label_rows, "next_token_loss", fails)
    config = make_config(
        tmp_path / "c.yaml", model, tmp_path / "run", adapter={"metric": "magnitude"}, evaluate={"enabled": False}
    )
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    assert "training ran out of memory; by the plan, set train.per_device_train_batch_size=4 (now 8)" in one_line(capsys)


def test_out_of_memory_where_there_is_no_plan(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a head alone nothing is planned; the run still ends in one line."""

    def fails(*args: object, **kwargs: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(label_rows, "next_token_loss", fails)
    adapter = {"method": "head", "train_dense": ["model.norm.weight"]}
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", adapter=adapter, evaluate={"enabled": False})
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    assert "set a smaller train.per_device_train_batch_size" in one_line(capsys)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("base", {}, "lower evaluate.batch_size (now 4), evaluate.max_new_tokens (now 2)"),
        ("base", {"evaluate": {"generation": False, "batch_size": 1}}, "lower data.max_length (now 256)"),
        ("evaluate", {"evaluate": {"base": False}}, "lower evaluate.batch_size (now 4)"),
        ("mask", {}, "lower adapter.calibration_batch_size (now 16), adapter.memory_limit (now half of what is free)"),
        ("mask", {"adapter": {"memory_limit": "2GiB"}}, "adapter.memory_limit (now 2GiB), data.max_length (now 256)"),
        ("load", {}, "model.dtype=bfloat16"),
    ],
)
def test_out_of_memory_in_a_stage_names_it_and_what_to_lower(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stage: str, settings: dict[str, Any], words: str,
) -> None:  # fmt: skip
    """The allocation that fails is one of the model's own, in its forward or, of load, in its construction."""
    from transformers import LlamaForCausalLM

    from speft_train import stages

    now = [""]

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if now[0] == stage:
            raise CUDA
        return whole(self, *args, **kwargs)

    def noting(row: stages.Stage) -> Any:
        def work(run: Any) -> Any:
            now[0] = row.name
            return row.work(run)

        return work

    name = "__init__" if stage == "load" else "forward"
    whole = getattr(LlamaForCausalLM, name)
    fails.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, name, fails)
    monkeypatch.setattr(stages, "STAGES", tuple(stages.Stage(**{**vars(s), "work": noting(s)}) for s in stages.STAGES))
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", **settings)
    assert cli.guarded(lambda: cli.execute(config, [], dry_run=False)) == 2
    told = one_line(capsys)
    assert f"stage {stage} ran out of memory" in told and words in told
    assert (tmp_path / "run/adapter").exists() == (stage == "evaluate"), "what earlier stages made is kept"
    monkeypatch.undo()
    cli.execute(config, [], dry_run=False)  # the same command goes on


def test_a_bug_in_a_stage_keeps_its_traceback(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speft_train import scoring

    def wrong(*args: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(scoring, "score", wrong)
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", evaluate={"enabled": False})
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli.guarded(lambda: cli.execute(config, [], dry_run=False))
