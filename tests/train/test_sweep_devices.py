"""`speft-train sweep --devices`: GPUs that are not there are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from speft_core.errors import UserError
from speft_train import sweep
from speft_train.sweep import Settings


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "name", "told"),
    [
        (0, None, "0", "must name GPUs of this machine; got 0, and torch finds none"),
        (0, "", "GPU-4f2a", "torch finds none"),
        (2, None, "7", "GPUs that can be used here: 0, 1; got 7"),
        (2, None, "two", "GPUs that can be used here: 0, 1; got two"),
        (2, "4, 7", "0", "GPUs that can be used here: 4, 7; got 0"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, name: str, told: str
) -> None:
    with_gpus(monkeypatch, count, visible)
    with pytest.raises(UserError, match=told):
        Settings(devices=[name]).check_devices()


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["0", "1"]), ("4, 7", ["7", "4"]), (None, ["GPU-4f2a", "MIG-77"]), ("GPU-4f2a", ["GPU-4f2a"])]
)
def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    with_gpus(monkeypatch, 2, visible)
    Settings(jobs=2, devices=names).check_devices()


def test_no_devices_ask_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    Settings().check_devices()


def test_a_sweep_checks_its_devices_before_it_runs_and_not_where_it_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    data = tmp_path / "rows.jsonl"
    tree = {
        "output_dir": str(tmp_path / "out"), "model": {"name": "m"}, "data": {"train": str(data), "test": str(data)},
        "adapter": {"budget": {"k": 1}},
    }  # fmt: skip
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sweep, "plan", lambda *args: None)
    monkeypatch.setattr(sweep, "run_cells", lambda *args: pytest.fail("a run was started"))
    sweep.execute(file, [], [], None, True, Settings(devices=["7"]))
    with pytest.raises(UserError, match="got 7, and torch finds none"):
        sweep.execute(file, [], [], None, False, Settings(devices=["7"]))
