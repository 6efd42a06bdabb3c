"""Runs and adapters of versions that knew fewer rules stay readable; a new start of such a run is held to the rules of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from speft_core import UserError
from speft_train import config
from speft_train.folder import RunFolder
from speft_train.lm import subjects

BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
LOCAL = {"scope": "local", "dynamic": {"interval": 2, "policy": "grow_and_drop"}}
# What was accepted once, section by section, and the key that is refused today.
ACCEPTED: list[tuple[dict[str, Any], str]] = [
    ({"train": {**BEST, "save_steps": 2}}, "train.save_steps"),
    ({"data": {"system_prompt": "Be brief."}}, "data.system_prompt"),
    ({"data": {"instruction": "Is {text} good?"}}, "data.instruction"),
    ({"adapter": LOCAL}, "adapter.dynamic.policy"),
    ({"deepspeed": {"offload_optimizer": "cpu"}}, "deepspeed.offload_optimizer"),
]


def tree(**sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "output_dir": "out",
        "model": {"name": "m"},
        "data": {"train": "d.jsonl"},
        "adapter": {"budget": {"k": 10}},
        "train": {"max_steps": 10},
    }
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section}
    return made


def written(file: Path, **sections: Any) -> Path:
    """As an earlier version wrote it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree(**sections)))
    return file


@pytest.mark.parametrize(("sections", "key"), ACCEPTED)
def test_what_was_accepted_when_it_was_written_is_read(tmp_path: Path, sections: dict[str, Any], key: str) -> None:
    run = tmp_path / "run"
    file = written(run / "config.yaml", **sections)
    (run / "adapter").mkdir()
    written(run / "adapter/training_config.yaml", **sections)
    with pytest.raises(UserError, match=f"has 1 mistake: {key}: "):
        config.load_config(file)
    with pytest.raises(UserError, match="holds a run of another config"):
        RunFolder(run).check(config.from_mapping({**tree(), "seed": 1}))
    for subject in subjects.subjects([str(run), str(run / "adapter")], None, None):
        assert subject.cfg == config.from_mapping(tree(**sections), stored=True)


def test_a_stored_config_still_is_one(tmp_path: Path) -> None:
    """Single keys are checked as ever: nothing could be made of them."""
    for section in ({"train": {"max_steps": "many"}}, {"adapter": {"metrik": "random"}}):
        with pytest.raises(UserError, match="has 1 mistake"):
            config.load_config(written(tmp_path / "config.yaml", **section), stored=True)


@pytest.mark.parametrize(("key", "value"), [("system_prompt", "Be brief."), ("instruction", "Is {text} good?")])
def test_a_run_goes_on_without_the_text_that_nothing_read(tmp_path: Path, key: str, value: str) -> None:
    """Where it is read it counts."""
    read = {"data": {"template": "chat", "instruction": "{text}"}, "model": {"task": "sequence_classification"}}
    for name, sections in (("unread", {}), ("read", read)):
        data = sections.get("data", {})
        written(tmp_path / name / "config.yaml", **{**sections, "data": {**data, key: value}})
        (tmp_path / name / "mask.safetensors").write_bytes(b"")  # it has begun
    RunFolder(tmp_path / "unread").claim(config.from_mapping(tree()))
    with pytest.raises(UserError, match=f"data.{key} is .*there and"):
        RunFolder(tmp_path / "read").claim(config.from_mapping(tree(**read)))


@pytest.mark.parametrize("corrected", [{"save_steps": 1}, {}], ids=["corrected", "left out"])
def test_a_run_goes_on_with_the_interval_between_its_checkpoints_corrected(tmp_path: Path, corrected: dict[str, Any]) -> None:
    written(tmp_path / "config.yaml", train={"max_steps": 10, **BEST, "save_steps": 2})
    (tmp_path / "mask.safetensors").write_bytes(b"")  # it has begun
    RunFolder(tmp_path).claim(config.from_mapping(tree(train={**BEST, **corrected})))
    with pytest.raises(UserError, match="train.eval_steps is 1 there and 2 here"):
        RunFolder(tmp_path).check(config.from_mapping(tree(train={**BEST, "eval_steps": 2})))
