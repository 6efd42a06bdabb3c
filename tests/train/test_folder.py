"""Whose an output folder is, and which stages are done in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speft_core import UserError
from speft_train import config
from speft_train.folder import RunFolder, identity


def made(**sections: Any) -> config.RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "out",
        "model": {"name": "m"},
        "data": {"train": "d.jsonl"},
        "adapter": {"budget": {"k": 10}},
        "train": {"global_batch_size": 8, "max_steps": 10},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return config.from_mapping(tree)


SAME = [
    {"deepspeed": {"zero_stage": 2}},
    {"evaluate": {"limit": 5}},
    {"output_dir": "elsewhere"},
    {"train": {"logging_steps": 1, "save_steps": 7, "per_device_train_batch_size": 2}},
    {"train": {"activation_checkpointing": True}},
]
OTHER = [
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"train": {"max_steps": 20}}, "train.max_steps is 10 there and 20 here"),
    ({"train": {"global_batch_size": 16}}, "train.global_batch_size is 8 there and 16 here"),
    ({"adapter": {"metric": "random"}}, 'adapter.metric is "gradient" there and "random" here'),
    ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ({"train": {"weight_decay": 0.1}}, "train.weight_decay is not set there and 0.1 here"),
]


@pytest.mark.parametrize("sections", SAME)
def test_how_it_runs_and_what_is_measured_may_change(tmp_path: Path, sections: dict[str, Any]) -> None:
    RunFolder(tmp_path / "run").claim(made())
    RunFolder(tmp_path / "run").claim(made(**sections))
    assert config.load_config(tmp_path / "run" / "config.yaml") == made(**sections)


@pytest.mark.parametrize(("sections", "message"), OTHER)
def test_a_run_of_another_config_is_refused_and_left_alone(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    first = RunFolder(tmp_path / "run")
    first.claim(made())
    first.finish("mask", "key", {})
    first.release()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        RunFolder(tmp_path / "run").claim(made(**sections))
    assert "output_dir=" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_run_that_ended_at_once_is_in_nobodys_way(tmp_path: Path) -> None:
    """As after a misspelled data file: only its config is there. A config that a person wrote there stays."""
    first, second, place = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run"), tmp_path / "run" / "config.yaml"
    first.claim(made())
    with pytest.raises(UserError, match="in use by another run"):
        second.claim(made(seed=1))
    assert config.load_config(place) == made()
    first.release()
    second.claim(made(seed=1))
    assert config.load_config(place) == made(seed=1)
    second.release()
    place.write_text(written := "# mine\n" + place.read_text())
    with pytest.raises(UserError, match="holds a run of another config"):
        RunFolder(tmp_path / "run").claim(made(seed=2))
    assert place.read_text() == written


def test_without_a_global_batch_the_micro_batch_counts() -> None:
    micro = [identity(replace(made(), train={"per_device_train_batch_size": size})) for size in (2, 4, 2)]
    assert micro[0] != micro[1]
    assert micro[0] == micro[2]


def test_a_folder_that_is_no_run_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds files that are not a run's"):
        RunFolder(tmp_path).claim(made())
    with pytest.raises(UserError, match="must be a folder"):
        RunFolder(tmp_path / "thesis.txt").claim(made())
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").claim(made())


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="a run that cannot be read") as error:
        RunFolder(tmp_path).check(made())
    assert "\n" not in str(error.value)


def test_a_stage_is_done_when_key_and_files_agree(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_done("mask", "a", ())
    folder.finish("mask", "a", {"k": 5})
    folder.finish("base", "b", {})
    assert folder.is_done("mask", "a", ())
    assert not folder.is_done("mask", "other", ())
    assert not folder.is_done("mask", "a", ("mask.safetensors",))
    (tmp_path / "mask.safetensors").write_bytes(b"")
    assert folder.is_done("mask", "a", ("mask.safetensors",))
    assert folder.result("mask") == {"k": 5}
    assert folder.result("train") == {}


def test_damaged_records_are_told(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match="remove it to run all stages again"):
        RunFolder(tmp_path).records()


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.claim(made())
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(UserError, match="is in use by another run"):
        second.claim(made())
    first.claim(made())  # its own again
    first.release()
    second.claim(made())
    second.release()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
