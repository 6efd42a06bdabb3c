"""Settings of a language model that are chosen on validation data while the table shows test data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import pico_run
from speft_train import sweep


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
