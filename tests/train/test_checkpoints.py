"""Checkpoint folders: only whole ones count, the last one stays, and what does not fit is refused in one line."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import pico
import speft_core as sc
from speft_train import checkpoints, shards


def make(run: Path, *steps: int, complete: bool = True) -> None:
    for step in steps:
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainable.safetensors").write_bytes(b"x")
        if complete:
            checkpoints.mark_complete(folder, {"engine": "torch"})


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_the_newest_complete_one_is_found_by_its_number(tmp_path: Path) -> None:
    make(tmp_path, 90, 100, 9)
    make(tmp_path, 110, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-120").write_text("a file")
    assert names(checkpoints.complete(tmp_path)) == ["checkpoint-9", "checkpoint-90", "checkpoint-100"]
    assert checkpoints.remove_incomplete(tmp_path) == ["checkpoint-110"]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert names(checkpoints.found(tmp_path)) == ["checkpoint-9", "checkpoint-90", "checkpoint-100"]


@pytest.mark.parametrize(
    ("limit", "keep", "left"), [(None, None, [1, 2, 3]), (2, None, [2, 3]), (1, None, [3]), (1, "checkpoint-1", [1, 3])]
)
def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path, limit: int | None, keep: str | None, left: list[int]) -> None:
    make(tmp_path, 1, 2, 3)
    make(tmp_path, 4, complete=False)
    checkpoints.rotate(tmp_path, limit, keep)
    assert [checkpoints.step_of(f) for f in checkpoints.complete(tmp_path)] == left
    assert (tmp_path / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("limit", "best", "left"), [(None, True, [1, 2, 3]), (2, True, [1, 2, 3]), (1, False, [3]), (1, True, [2])]
)
def test_a_run_that_is_over_keeps_what_shipped(tmp_path: Path, limit: int | None, best: bool, left: list[int]) -> None:
    """Found by its name: a run's folder may have moved since."""
    make(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / checkpoints.STATE).write_text('{"best_model_checkpoint": "elsewhere/run/checkpoint-2"}')
    checkpoints.settle(tmp_path, limit, best)
    assert [checkpoints.step_of(f) for f in checkpoints.complete(tmp_path)] == left


def attached(k: int = 40, seed: int = 0) -> tuple[torch.nn.Module, sc.Tuner]:
    model = pico.llama()
    mask = sc.find_mask(model, metric="random", budget=sc.Budget(k=k), seed=seed)
    return model, sc.attach(model, mask)


def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(tmp_path: Path) -> None:
    model, tuner = attached()
    for p in tuner.parameters():
        p.data.normal_()
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    checkpoints.save_trainable(shards.collected(checkpoints.trainable(model), keeps=True), folder)
    assert (folder / "trainable.safetensors").stat().st_size < 40 * 4 + 4096
    again, other = attached()
    checkpoints.load_trainable(again, folder)
    for p, q in zip(tuner.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    batch = pico.batch(model)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    model, _ = attached()
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    checkpoints.save_trainable(shards.collected(checkpoints.trainable(model), keeps=True), folder)
    other, tuner = attached(k=60)
    with pytest.raises(sc.UserError, match="does not fit this run: .* has shape"):
        checkpoints.load_trainable(other, folder)
    assert all(bool((p == 0).all()) for p in tuner.parameters())
    with pytest.raises(sc.UserError, match="trained in only one of them"):
        checkpoints.load_trainable(pico.llama(), folder)


def test_a_damaged_checkpoint_names_its_file(tmp_path: Path) -> None:
    model, _ = attached()
    make(tmp_path, 1)
    with pytest.raises(sc.UserError, match=r"checkpoint-1/trainable.safetensors cannot be read"):
        checkpoints.load_trainable(model, tmp_path / "checkpoint-1")


def test_no_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 5 << 20))
    model, _ = attached()
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with pytest.raises(sc.UserError, match="no space for checkpoint checkpoint-1: it needs .* has 5 MiB free"):
        checkpoints.save_trainable(shards.collected(checkpoints.trainable(model), keeps=True), folder)
    assert not list(folder.iterdir())


def test_a_state_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Without it nobody knows which checkpoint is the best."""
    make(tmp_path, 1)
    (tmp_path / "checkpoint-1" / checkpoints.STATE).write_text('{"global_step": 1')
    with pytest.raises(sc.UserError, match=r"checkpoint-1/trainer_state.json cannot be read; remove .*checkpoint-1 to start"):
        checkpoints.shipped(tmp_path / "checkpoint-1", best=True)


def test_the_marker_says_who_can_load_the_optimizer(tmp_path: Path) -> None:
    make(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    assert checkpoints.made_by(folder) == {"engine": "torch"} and checkpoints.plan(folder) == {}
    checkpoints.mark_complete(folder, {"engine": "torch", checkpoints.BATCH: 8, checkpoints.STEPS: 100})
    assert checkpoints.made_by(folder) == {"engine": "torch"}
    assert checkpoints.plan(folder) == {checkpoints.BATCH: 8, checkpoints.STEPS: 100}
    checkpoints.unmark(folder)
    assert checkpoints.made_by(folder) == checkpoints.plan(folder) == {}
    assert checkpoints.complete(tmp_path) == []
