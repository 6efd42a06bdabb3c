"""DeepSpeed's settings, and when it is used at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from speft_core import UserError
from speft_train import engine
from speft_train.config import DeepspeedSection


def test_auto_means_a_launcher_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not engine.is_enabled(DeepspeedSection())
    assert engine.is_enabled(DeepspeedSection(enabled=True))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert engine.is_enabled(DeepspeedSection())
    assert not engine.is_enabled(DeepspeedSection(enabled=False))


def test_several_processes_without_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert engine.launched_ranks() == (1, 2, 1)
    with pytest.raises(UserError, match="several processes need DeepSpeed"):
        engine.start(DeepspeedSection(enabled=False))


def test_settings_hold_the_stage_and_leave_batches_to_the_train_section() -> None:
    made = engine.settings(DeepspeedSection(zero_stage=2, offload_optimizer="cpu"))
    assert made["zero_optimization"] == {
        "stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": engine.REDUCE_BUCKET,
    }  # fmt: skip
    assert all(made[key] == "auto" for key in engine.FROM_TRAIN)
    assert "optimizer" not in made
    assert engine.zero_stage(DeepspeedSection(zero_stage=1)) == 1


def test_a_raw_config_wins_and_is_merged(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(raw))
    for given in (raw, str(file)):
        made = engine.settings(DeepspeedSection(zero_stage=1, config=given))
        assert made["zero_optimization"] == raw["zero_optimization"]
        assert engine.settings(DeepspeedSection(zero_stage=3))["zero_optimization"]["stage3_max_live_parameters"] > 0
        assert made["wall_clock_breakdown"] is True
        assert made["bf16"] == {"enabled": "auto"}


def test_a_section_that_is_null_is_as_if_it_were_not_there() -> None:
    nothing = dict.fromkeys([*engine.SECTIONS, *engine.FROM_TRAIN])
    assert engine.settings(DeepspeedSection(zero_stage=1, config=nothing)) == engine.settings(DeepspeedSection(zero_stage=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not a JSON file"),
        ("[1]", "must hold a JSON object; got list"),
        ('{"train_batch_size": 8}', "train_batch_size follows from the train section; got 8, allowed: auto"),
        ('{"bf16": true}', "bf16 must be a mapping; got True"),
    ],
)
def test_a_raw_config_that_cannot_be_used_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        engine.settings(DeepspeedSection(config=str(file)))
    assert "\n" not in str(error.value)


def test_the_command_line_starts_without_deepspeed_and_transformers() -> None:
    code = (
        "import sys, speft_train.cli, speft_train.engine, speft_train.refusals, speft_train.config;"
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'transformers', 'peft', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
