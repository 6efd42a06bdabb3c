"""A mask that changes while the Trainer trains: optimizer steps, resume, what ships, what is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import speft_core as sc
from pico_run import make_config, make_model
from speft_core import UserError
from speft_core.targets import base_parameters
from speft_train import cli, dynamic, results, scoring, stages
from speft_train.folder import RunFolder

Bits = dict[str, torch.Tensor]
Execute = Callable[..., dict[str, Any]]
STEPS = 11


class Killed(BaseException):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def finals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Bits]:
    """Folder name -> the model's weights when the run took its adapter off, just after saving it."""
    seen: dict[str, Bits] = {}

    def watched(run: Any) -> Any:
        detach = run.attached.detach

        def record() -> None:
            seen[run.folder.path.name] = {n: p.detach().clone() for n, p in base_parameters(run.model).items()}
            detach()

        object.__setattr__(run.attached, "detach", record)
        return save(run)

    save = next(s.work for s in stages.STAGES if s.name == "save")
    rows = tuple(stages.Stage(**{**vars(s), "work": watched if s.name == "save" else s.work}) for s in stages.STAGES)
    monkeypatch.setattr(stages, "STAGES", rows)
    return seen


@pytest.fixture
def execute(tmp_path: Path, model: Path) -> Execute:
    """Run 11 steps of two micro-batches each, the mask changing at 3, 6 and 9; a checkpoint every other step."""

    def run(
        name: str = "run", dtype: str = "float32", train: dict[str, Any] | None = None, data: dict[str, Any] | None = None,
        deepspeed: dict[str, Any] | None = None, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        settings = {"interval": 3, "examples": 8, **settings}
        adapter = {"budget": {"k": 400}, "calibration_examples": 8, "calibration_batch_size": 4, "dynamic": settings}
        steps = {"max_steps": STEPS, "per_device_train_batch_size": 4, **(train or {})}
        config = make_config(
            tmp_path / f"{name}.yaml", model, tmp_path / name, model={"dtype": dtype}, adapter=adapter, train=steps,
            evaluate={"enabled": False}, data=data or {}, deepspeed=deepspeed or {},
        )  # fmt: skip
        cli.execute(config, [], dry_run=False)
        return results.read(RunFolder(tmp_path / name))

    return run


def same(left: Bits, right: Bits) -> bool:
    as_bytes = [{n: t.contiguous().view(torch.uint8) for n, t in side.items()} for side in (left, right)]
    return left.keys() == right.keys() and all(torch.equal(t, as_bytes[1][n]) for n, t in as_bytes[0].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_changes_by_optimizer_steps_and_the_adapter_gives_the_final_weights(
    tmp_path: Path, model: Path, execute: Execute, finals: dict[str, Bits], dtype: str
) -> None:
    found = execute(dtype=dtype)
    told = found["dynamic"]
    assert [c["step"] for c in told["changes"]] == [3, 6, 9] and told["optimizer_steps"] == STEPS
    assert told["active"] == 400 == found["trainable_parameters"]
    assert told["union"] > 400 and all(0 < c["overlap"] < 1 and c["active"] == 400 for c in told["changes"])
    run = tmp_path / "run"
    adapter = sc.SparseAdapter.load(run / "adapter")
    assert adapter.nnz == told["union"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    before = {n: p.detach().clone() for n, p in base_parameters(base).items()}
    with adapter.applied(base):
        assert same(base_parameters(base), finals["run"])
    assert same(base_parameters(base), before) and not same(before, finals["run"])
    masks = sorted(f.name for f in (run / "masks").iterdir())
    assert masks == [f"step-{step:06d}.safetensors" for step in (3, 6, 9)]
    first, second = (sc.SparsityMask.load(run / name) for name in ("mask.safetensors", "masks/step-000003.safetensors"))
    kept = sum(int(torch.isin(i, second.indices[n]).sum()) for n, i in first.indices.items())
    assert kept == told["changes"][0]["kept"]
    report = (run / "report.md").read_text()
    assert "## Changes of the mask" in report and f"400 and {told['union']:,} scalars" in report
    assert (run / "overlap.png").stat().st_size > 0


def test_no_mask_is_chosen_that_no_step_would_train(execute: Execute) -> None:
    found = execute(train={"max_steps": 6})
    assert [c["step"] for c in found["dynamic"]["changes"]] == [3] and found["dynamic"]["optimizer_steps"] == 6


ENDS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("between", "inside")), ({"policy": "grow_and_drop", "keep_optimizer_state": True}, ("inside",))
]  # fmt: skip


@pytest.mark.parametrize(("settings", "ends"), ENDS, ids=str)
def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path, execute: Execute, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], ends: tuple[str, ...]
) -> None:
    """Between two changes (step 8; the last checkpoint is of step 6), and inside the second one, in its second batch."""
    whole = execute("whole", **settings)
    calibration, ended = scoring.calibration, dynamic.ChangeMask.on_step_end

    def dying(run: Any, count: int, change: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(calibration(run, count, change)):
            if change == 2 and number == 1:
                raise Killed
            yield batch

    def dies_at_8(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended(self, args, state, control, **kwargs)
        if state.global_step == 8:
            raise Killed

    stand_ins: dict[str, Any] = {
        "between": (dynamic.ChangeMask, "on_step_end", dies_at_8),
        "inside": (scoring, "calibration", dying),
    }
    for name in ends:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*stand_ins[name])
            execute(name, **settings)
        newest = max(int(f.name.rpartition("-")[2]) for f in (tmp_path / name).glob("checkpoint-*"))
        assert newest == {"between": 6, "inside": 4}[name]
        again = execute(name, **settings)
        assert again["digest"] == whole["digest"] and again["dynamic"] == whole["dynamic"]
        assert [r["loss"] for r in again["history"]] == [r["loss"] for r in whole["history"]]
        for file in ("adapter/adapter_model.safetensors", "masks/step-000009.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_killed_after_the_last_step_prunes_again_to_the_same(tmp_path: Path, execute: Execute) -> None:
    whole = execute(final_budget=150)
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert execute(final_budget=150)["digest"] == whole["digest"]
    cost = whole["dynamic"]["pruned"]
    assert cost["kept"] == 150 == whole["dynamic"]["union"] and cost["dropped"] == cost["union"] - 150 > 0
    assert 0 < cost["lost"] < 1 and cost["loss_after"] != cost["loss_before"]
    assert sc.SparseAdapter.load(tmp_path / "run" / "adapter").nnz == 150
    assert "pruned to 150 of" in (tmp_path / "run" / "report.md").read_text()


def test_the_best_checkpoint_brings_its_own_mask(
    tmp_path: Path, execute: Execute, finals: dict[str, Bits], model: Path
) -> None:
    """load_best_model_at_end goes back behind changes of the mask; the "best" is the worst here, which comes early."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    settings |= {"metric_for_best_model": "eval_loss", "learning_rate": 1.0}
    found = execute(train=settings, data={"validation_from_train": 8})
    steps = [row["step"] for row in found["history"] if "eval_loss" in row]
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    best = steps[losses.index(max(losses))]
    assert 3 < best < 9 and found["steps"] == STEPS
    assert [c["step"] for c in found["dynamic"]["changes"]] == [step for step in (3, 6, 9) if step <= best]
    base = AutoModelForCausalLM.from_pretrained(model)
    with sc.SparseAdapter.load(tmp_path / "run" / "adapter").applied(base):
        assert same(base_parameters(base), finals["run"])


def test_zero_stages_that_flatten_values_are_refused(execute: Execute) -> None:
    with pytest.raises(UserError, match="adapter.dynamic needs deepspeed.zero_stage 0: .*; allowed: 0") as caught:
        execute(deepspeed={"enabled": True, "zero_stage": 2})
    assert "\n" not in str(caught.value)
