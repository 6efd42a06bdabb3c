"""Settings of a language model that are chosen on validation data while the table shows test data."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import pico_run
from speft_train import cli, sweep, sweep_curves
from speft_train.folder import RunFolder
from speft_train.sweep_config import load_sweep


def test_a_language_model_with_test_data_is_chosen_by_validation_data_too(tmp_path: Path) -> None:
    base = pico_run.make_model(tmp_path / "base")
    file = pico_run.make_config(
        tmp_path / "lm.yaml", base, tmp_path / "out",
        data={"validation_from_train": 6}, evaluate={"generation": False, "base": False},
        train={"max_steps": 2, "use_cpu": True, "save_strategy": "no", "report_to": "none"},
        sweep={"tune": {"train.learning_rate": [1e-6, 5e-1]}, "seeds": 2},
    )  # fmt: skip
    sweep.execute(file, [], [], None, False, sweep.Settings())
    figures = {}
    for rate in ("1e-06", "0.5"):
        folder = tmp_path / f"out/score/run/learning_rate-{rate}"
        figures[rate] = json.loads((folder / "seed0/results.json").read_text())["adapted"]
        assert figures[rate]["count"] == 4 and figures[rate]["validation"]["count"] == 6
        assert figures[rate]["validation"]["loss"] != figures[rate]["loss"]
    best = min(figures, key=lambda rate: figures[rate]["validation"]["loss"])
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert [(float(line["train.learning_rate"]), line["seed"]) for line in lines] == [(float(best), "0"), (float(best), "1")]
    assert float(lines[0]["loss"]) == pytest.approx(figures[best]["loss"])
    assert float(lines[0]["validation_loss"]) == pytest.approx(figures[best]["validation"]["loss"])
    assert lines[1]["validation_loss"] == ""  # nothing is chosen by another seed
    made = load_sweep(file)
    (curve,) = sweep_curves.rate_curves(made, sweep._found(made.every_cell())).values()
    drawn = {x: score for x, score, _ in curve["gradient"]}  # of validation data alone: another seed's test figure is no part of it
    assert drawn == {float(rate): pytest.approx(found["validation"]["loss"]) for rate, found in figures.items()}


def lm_sweep(folder: Path, section: dict[str, Any], **sections: Any) -> Path:
    """A sweep over runs of two steps of a language model."""
    sections = {
        "evaluate": {"generation": False}, "train": {"max_steps": 2, "use_cpu": True, "save_strategy": "no", "report_to": "none"},
        **sections, "sweep": section,
    }  # fmt: skip
    return pico_run.make_config(folder / "lm.yaml", pico_run.make_model(folder / "base"), folder / "out", **sections)


def test_a_row_with_one_candidate_is_not_chosen_by_figures(tmp_path: Path) -> None:
    """It measures no validation data, and its first seed is run once, with the others."""
    rows = {"sparse": {}, "full": {"adapter.method": "full", "tune": {"train.learning_rate": [1e-4]}}}
    section = {"tune": {"train.learning_rate": [1e-6, 5e-1]}, "rows": rows}
    file = lm_sweep(tmp_path, section, data={"validation_from_train": 6}, evaluate={"generation": False, "base": False})
    sweep.execute(file, [], [], None, False, sweep.Settings())
    lines = {line["row"]: line for line in csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines())}
    assert set(lines) == {"sparse", "full"} and float(lines["full"]["train.learning_rate"]) == 1e-4
    assert lines["full"]["loss"] and lines["full"]["validation_loss"] == "" and lines["sparse"]["validation_loss"]


def test_only_rows_with_a_choice_are_run_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sparse": {}, "full": {"adapter.method": "full", "tune": {"train.learning_rate": [1e-4]}}}
    file = lm_sweep(tmp_path, {"tune": {"train.learning_rate": [1e-6, 5e-1]}, "rows": rows}, data={"validation_from_train": 6})
    ran: list[str] = []
    monkeypatch.setattr(sweep, "run_cells", lambda cells, *_: ran.extend(cell.row for cell in cells))
    monkeypatch.setattr(sweep, "figures", lambda cell: {"adapted": {"validation": {"loss": 1.0}}})
    chosen = sweep._tuned(load_sweep(file), sweep.Console(), sweep.Settings())
    assert ran == ["sparse", "sparse"] and set(chosen) == {("sparse", "score"), ("full", "score")}


def test_what_measures_validation_data_anyway_is_not_told_to(tmp_path: Path) -> None:
    """A file without test data beside it: the finished cells of earlier versions stay done."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 8)
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_from_train": 2, "train_size": None, "test_size": None}
    file = lm_sweep(tmp_path, {"tune": {"train.learning_rate": [1e-6, 5e-1]}}, data=data)

    def measures(*overrides: str) -> set[bool]:
        return {cell.cfg.evaluate.validation for cell in load_sweep(file, overrides).every_cell()}

    assert measures() == {False}
    assert measures(f"data.test={tmp_path / 'rows.jsonl'}") == {True} == measures("data.train=owner/set")


def test_the_base_is_not_measured_again_for_validation_data_of_what_was_trained(tmp_path: Path) -> None:
    """A run of an earlier version, or one that was not chosen by, which is now to measure validation data too."""
    file = lm_sweep(tmp_path, {}, data={"validation_from_train": 6})
    cli.execute(file, [], dry_run=False)
    before = RunFolder(tmp_path / "out").records()
    cli.execute(file, ["evaluate.validation=true"], dry_run=False)
    after = RunFolder(tmp_path / "out").records()
    assert after["evaluate"]["result"]["figures"]["validation"]["count"] == 6
    assert {name for name in before if before[name] != after[name]} == {"load", "evaluate", "report"}
