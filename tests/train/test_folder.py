"""Whose an output folder is, and which stages are done in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speft_core import UserError
from speft_train import config, contents, stages
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
    {"deepspeed": {"config": {"bf16": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}}},
    {"deepspeed": {"enabled": False, "config": {"optimizer": {"type": "Lamb"}}}},
]
OTHER = [
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"train": {"max_steps": 20}}, "train.max_steps is 10 there and 20 here"),
    ({"train": {"global_batch_size": 16}}, "train.global_batch_size is 8 there and 16 here"),
    ({"adapter": {"metric": "random"}}, 'adapter.metric is "gradient" there and "random" here'),
    ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ({"train": {"weight_decay": 0.1}}, "train.weight_decay is not set there and 0.1 here"),
    (
        {"deepspeed": {"config": {"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}}}},
        'deepspeed.config.optimizer.type is not set there and "Lamb" here, deepspeed.config.optimizer.params.lr is not set there and 0.1',
    ),
    ({"deepspeed": {"config": {"scheduler": {"type": "WarmupLR"}}}}, "deepspeed.config.scheduler.type is not set there"),
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


STEPWISE = {"eval_strategy": "steps"}
EPOCHWISE = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
STEERED = [
    {**STEPWISE, "load_best_model_at_end": True},
    {**STEPWISE, "early_stopping_patience": 2, "metric_for_best_model": "loss"},
    {**STEPWISE, "lr_scheduler_type": "reduce_lr_on_plateau"},
]
WRITTEN = {"logging_steps": 3, "save_steps": 7, "save_strategy": "no", "per_device_eval_batch_size": 2}
CADENCE = [
    ({}, WRITTEN, []),
    (STEPWISE, WRITTEN, []),
    *((train, {"logging_steps": 3}, ["train.logging_steps"]) for train in STEERED),
    *((train, {"per_device_eval_batch_size": 1}, []) for train in STEERED),
    *((train, {"save_strategy": "best"}, ["train.save_strategy"]) for train in STEERED),
    ({**STEERED[0], "eval_steps": 5}, {"logging_steps": 3, "save_steps": 5}, []),
    ({**STEERED[1], "eval_steps": 5}, {"logging_steps": 3, "save_steps": 7}, []),
    (STEERED[0], {"eval_steps": 5}, ["train.eval_steps"]),
    (EPOCHWISE, {"logging_steps": 3}, []),
]


@pytest.mark.parametrize(("train", "changed", "counted"), CADENCE)
def test_when_it_is_measured_and_saved_counts_where_that_may_decide_what_ships(
    train: dict[str, Any], changed: dict[str, Any], counted: list[str]
) -> None:
    one, other = (identity(made(train=keys)) for keys in (train, {**train, **changed}))
    assert sorted(key for key in {**one, **other} if one.get(key) != other.get(key)) == counted


def test_the_optimizer_of_a_deepspeed_file_counts_also_where_its_name_stays(tmp_path: Path) -> None:
    """As text in the config, in a file, or in that file changed; that it is gone says nothing."""
    file, cfg = tmp_path / "ds.json", made(deepspeed={"config": str(tmp_path / "ds.json")})
    block = {"optimizer": {"type": "Lamb"}}
    file.write_text(json.dumps({**block, "bf16": {"enabled": True}}))
    assert identity(cfg) == identity(made(deepspeed={"config": block})) != identity(made())
    first = RunFolder(tmp_path / "run")
    found = first.claim(cfg)
    (tmp_path / "run/adapter").mkdir()
    first.finish("save", "key", {}, contents.learned(cfg, found))
    file.write_text(json.dumps({**block, "bf16": {"enabled": False}}))
    assert first.claim(cfg) == found
    file.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    with pytest.raises(UserError, match=f"was trained before the optimizer or scheduler of deepspeed.config .{file}. changed"):
        first.claim(cfg)
    file.unlink()
    first.claim(made(deepspeed={"config": block}))
    with pytest.raises(UserError, match="ds.json does not exist"):
        first.check(cfg)


def test_keys_that_older_versions_did_not_count_make_no_record_of_theirs_old(tmp_path: Path) -> None:
    """Nor do they stand for another config in a record that counts them."""
    stage = stages.STAGES[-1]
    cfg, plain = made(train={**EPOCHWISE, "save_total_limit": 1}), made(train={"eval_strategy": "epoch", "load_best_model_at_end": True})
    assert stage.depends(cfg) != stage.depends(plain)
    folder = RunFolder(tmp_path)
    for name in stage.files:
        (tmp_path / name).write_text("")
    assert not stages.is_done(stage, cfg, folder)
    folder.finish(stage.name, stage.depends(plain), {})  # as they hashed both
    assert stages.is_done(stage, cfg, folder) and stages.is_done(stage, plain, folder)
    folder.finish(stage.name, stage.depends(plain), {}, {})
    assert stages.is_done(stage, plain, folder) and not stages.is_done(stage, cfg, folder)


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
