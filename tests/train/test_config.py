"""The run configuration: layers, overrides, and every kind of mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speft_core import UserError
from speft_train import train_args
from speft_train.config import (
    METRICS,
    RunConfig,
    batch_plan,
    from_mapping,
    key_table,
    load_config,
    section_hash,
    to_dict,
    to_yaml,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = "output_dir: out\nmodel: {name: m}\ndata: {train: d.jsonl}\nadapter: {budget: {k: 10}}\n"


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text, "an error is one line"
    return text


WHOLE = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "parts")  # parts are no runs


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    assert load_config(write(tmp_path, to_yaml(cfg))) == cfg


def test_there_are_configs_to_check() -> None:
    assert {"quickstart", "gsm8k_smollm2", "qwen2_7b_alpaca"} <= {path.stem for path in CONFIGS.rglob("*.yaml")}


def test_qwen2_is_the_row_of_the_paper() -> None:
    cfg = load_config(CONFIGS / "qwen2_7b_alpaca.yaml")
    assert cfg.adapter.budget.k == 40_370_176
    assert cfg.adapter.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert cfg.train["learning_rate"] == 5e-5
    assert cfg.train["lr_scheduler_type"] == "constant_with_warmup"
    assert (cfg.train["num_train_epochs"], cfg.train["warmup_steps"], cfg.train["weight_decay"]) == (3, 0.03, 0)
    for world in (1, 2, 4, 8, 16):
        per_device, accumulation = batch_plan(cfg, world)
        assert per_device * accumulation * world == 16


def test_overrides_come_last_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    cfg = load_config(
        path, ["seed=3", "train.learning_rate=1e-3", "adapter.targets=[q_proj, v_proj]", "data.columns.question=q", "seed=4"]
    )
    assert cfg.seed == 4
    assert cfg.train["learning_rate"] == 1e-3
    assert cfg.adapter.targets == ["q_proj", "v_proj"]
    assert cfg.data.columns == {"question": "q"}


@pytest.mark.parametrize("word", ["no", "'no'", "false"])
def test_a_strategy_of_no_may_be_written_as_people_do(tmp_path: Path, word: str) -> None:
    cfg = load_config(write(tmp_path, SMALL), [f"train.save_strategy={word}"])
    assert cfg.train["save_strategy"] == "no"
    assert "train.warmup_steps: must be" in message(write(tmp_path, SMALL), "train.warmup_steps=no")
    assert "train.save_strategy: must be" in message(write(tmp_path, SMALL), "train.save_strategy=yes")


def test_base_files_are_relative_to_the_file_and_lie_below_it(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", SMALL + "seed: 1\ntrain: {learning_rate: 1.0e-3, max_steps: 5}\n", "common.yaml")
    write(tmp_path / "parts", "base: common.yaml\nseed: 2\n", "more.yaml")
    path = write(tmp_path, "base: [parts/more.yaml]\noutput_dir: other\ntrain: {max_steps: 7}\n")
    cfg = load_config(path)
    assert (cfg.output_dir, cfg.seed, cfg.train) == ("other", 2, {"learning_rate": 1e-3, "max_steps": 7})


def test_a_new_budget_unit_replaces_that_of_the_layer_below(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    budget = load_config(path, ["adapter.budget.density=0.5"]).adapter.budget
    assert (budget.k, budget.density) == (None, 0.5)
    assert "exactly one of k, density, like_lora_r" in message(path, "adapter.budget.k=1", "adapter.budget.density=0.5")


def test_bases_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    path = write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "circle" in message(path)


def test_all_mistakes_are_told_at_once_with_their_paths(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "trian: {}\n")
    text = message(
        path,
        "adapter.metrik=gradient",
        "adapter.budget.density=2",
        "adapter.budget.k=null",
        "train.learning_rate=fast",
        "train.warmup_stps=3",
        "train.lr_scheduler_type=linaer",
        "data.overlong=crop",
        "seed=1.5",
    )
    for part in (
        "8 mistakes",
        "trian: unknown key. Did you mean 'train'?",
        "adapter.metrik: unknown key. Did you mean 'metric'?",
        "adapter.budget.density: must be at most 1; got 2",
        "train.learning_rate: must be a number; got 'fast'",
        "train.warmup_stps: unknown key. Did you mean 'warmup_steps'?",
        "train.lr_scheduler_type: 'linaer' is not a choice of transformers. Did you mean 'linear'?",
        "data.overlong: must be one of drop, truncate; got 'crop'. Did you mean 'drop'?",
        "seed: must be a whole number; got 1.5",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.name=3", "model.name: must be text; got 3"),
        ("model=3", "model: must be a mapping; got 3"),
        ("train=[1]", "train: must be a mapping; got [1]"),
        ("adapter.targets=3", "adapter.targets: must be text or a list of texts; got 3"),
        ("adapter.targets=[1]", "adapter.targets: must be text or a list of texts"),
        ("evaluate.enabled=1", "evaluate.enabled: must be true or false; got 1"),
        ("data.train_size=true", "data.train_size: must be a whole number or null; got True"),
        ("data.train_size=0", "data.train_size: must be at least 1; got 0"),
        ("data.word_problems.kinds=[ad]", "data.word_problems.kinds: each must be one of add, subtract"),
        ("data.word_problems.kinds=[]", "data.word_problems.kinds: must not be empty"),
        ("adapter.lora.dropout=1.0", "adapter.lora.dropout: must be less than 1; got 1.0"),
        ("adapter.budget.density=0", "adapter.budget.density: must be more than 0; got 0"),
        ("adapter.budget.density=.nan", "adapter.budget.density: must be a number or null; got nan"),
        ("adapter.budget=null", "adapter.budget: exactly one of k, density, like_lora_r must be set; got none"),
        ("deepspeed.enabled=maybe", "deepspeed.enabled: must be one of auto, true, false; got 'maybe'"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage: must be at most 3; got 4"),
        ("deepspeed.offload_param=cpu", "deepspeed.offload_param: cpu needs zero_stage 3; got stage 0"),
        ("train.output_dir=x", "train.output_dir: cannot be set here: set output_dir at the top level"),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing: is named activation_checkpointing"),
        ("train.warmup_ratio=0.1", "train.warmup_ratio: is named warmup_steps"),
        ("train.max_steps=0", "train.max_steps: must be at least 1, or -1 for num_train_epochs; got 0"),
        ("train.bf16=1", "train.bf16: must be true or false; got 1"),
        ("train.learning_rate=.inf", "train.learning_rate: must be a number; got inf"),
        ("output_dir=''", "output_dir: must not be empty"),
        ("data.columns={a: 1}", "data.columns: must be a mapping"),
        ("zzz=1", "zzz: unknown key. Known here: output_dir, seed, model"),
    ],
)
def test_one_mistake(tmp_path: Path, override: str, part: str) -> None:
    assert part in message(write(tmp_path, SMALL), override)


def test_missing_required_keys_are_named_with_what_they_mean(tmp_path: Path) -> None:
    text = message(write(tmp_path, "adapter: {budget: {k: 1}}"))
    for key in ("output_dir", "model.name", "data.train"):
        assert f"{key}: is required (" in text


@pytest.mark.parametrize("override", ["seed", "=3", "train.max_steps"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert f"overrides must look like section.key=value; got {override!r}" in message(write(tmp_path, SMALL), override)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "is not valid YAML"),
        ("a: 1\na: 2", "found duplicate key a"),
        ("- a", "must hold a mapping"),
        ("word", "must hold a mapping of keys to values; got 'word'"),
        ("a: !!python/object:os.system x", "is not valid YAML"),
        ("seed: ${nothing}", "an interpolation cannot be resolved"),
        ("base: 3", "base must be a file name or a list of them; got 3"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(write(tmp_path, text))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "no.yaml")
    assert "is a folder, not a YAML file" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    assert "cannot be read" in message(tmp_path / "latin.yaml")


def test_interpolation_reaches_other_keys(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, SMALL + "train: {data_seed: 1}\n"), ["seed=${train.data_seed}"])
    assert cfg.seed == 1


def test_hashes_follow_their_sections_only() -> None:
    cfg = load_config(CONFIGS / "quickstart.yaml")
    other = load_config(CONFIGS / "quickstart.yaml", ["train.max_steps=3"])
    assert section_hash(cfg, "model", "data") == section_hash(other, "model", "data")
    assert section_hash(cfg, "train") != section_hash(other, "train")
    assert section_hash(cfg) != section_hash(other)
    assert section_hash(cfg, "adapter.budget") == section_hash(other, "adapter.budget")
    assert section_hash(cfg) == section_hash(load_config(CONFIGS / "quickstart.yaml"))


def test_defaults_keep_their_own_rules() -> None:
    """Writing a default out changes nothing, and every field has a line of documentation."""
    cfg = load_config(CONFIGS / "quickstart.yaml")
    assert from_mapping(to_dict(cfg)) == cfg
    rows = key_table()
    assert len(rows) > 50
    assert all(doc and "\n" not in doc and len(doc.split(" (")[0]) < 100 for _, _, doc in rows)
    assert len({key for key, _, _ in rows}) == len(rows)


LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5)
KEYS = sorted({part for key, _, _ in key_table() for part in key.split(".")})
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3), max_leaves=8
)


@given(TREES)
def test_no_tree_ends_in_anything_but_a_config_or_a_user_error(tree: Any) -> None:
    try:
        assert isinstance(from_mapping(tree if isinstance(tree, dict) else {"model": tree}), RunConfig)
    except UserError as error:
        assert "mistake" in str(error)


@pytest.mark.parametrize(
    ("train", "world", "expected"),
    [
        ({}, 1, (8, 1)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 2, (4, 3)),
        ({"global_batch_size": 16}, 1, (8, 2)),
        ({"global_batch_size": 16, "per_device_train_batch_size": 16}, 1, (16, 1)),
        ({"global_batch_size": 12}, 4, (3, 1)),
        ({"global_batch_size": 14}, 1, (7, 2)),
    ],
)
def test_batch_plan(train: dict[str, Any], world: int, expected: tuple[int, int]) -> None:
    cfg = dataclasses.replace(load_config(CONFIGS / "quickstart.yaml"), train=train)
    assert batch_plan(cfg, world) == expected


@pytest.mark.parametrize(
    ("train", "world"),
    [
        ({"global_batch_size": 10}, 4),
        ({"global_batch_size": 2}, 4),
        ({"global_batch_size": 12, "per_device_train_batch_size": 8}, 1),
    ],
)
def test_a_global_batch_that_cannot_be_shared(train: dict[str, Any], world: int) -> None:
    cfg = dataclasses.replace(load_config(CONFIGS / "quickstart.yaml"), train=train)
    with pytest.raises(UserError, match="must be a multiple of"):
        batch_plan(cfg, world)


def test_train_fields_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(train_args.training_fields()) - set(train_args.OWN) == fields
    assert set(train_args.MANAGED) <= fields
    assert not set(train_args.LIMITS) - fields - set(train_args.OWN)
    assert {"linear", "constant_with_warmup"} <= set(train_args.enumerations()["SchedulerType"])


def test_the_defaults_of_transformers_pass_the_checks() -> None:
    """Otherwise a user could not write out what holds anyway."""
    from transformers import TrainingArguments

    wrong = {}
    for f in dataclasses.fields(TrainingArguments):
        default = f.default if f.default is not dataclasses.MISSING else None
        plain = getattr(default, "value", default)
        if f.name in train_args.MANAGED or f.name in train_args.RENAMED or default is None:
            continue
        if mistakes := train_args.check_train({f.name: plain}):
            wrong[f.name] = mistakes
    assert not wrong


def test_metrics_are_those_of_the_core() -> None:
    import speft_core as sc

    assert set(METRICS) == set(sc.METRICS)


def test_reading_a_config_imports_nothing_slow() -> None:
    code = (
        "import sys; from speft_train.config import load_config;"
        f"load_config({str(CONFIGS / 'quickstart.yaml')!r});"
        "slow = {'transformers', 'datasets', 'deepspeed', 'accelerate', 'peft'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_settings_that_would_not_be_read_are_mistakes(tmp_path: Path) -> None:
    path, classes = write(tmp_path, SMALL), "model.task=sequence_classification"
    told = message(path, "data.system_prompt=Be brief.", "data.instruction=Is {text} good")
    assert "has 2 mistakes" in told
    assert "data.system_prompt: is for data.template chat; the template is question_answer" in told
    assert "data.instruction: is for model.task sequence_classification; the task is causal_lm" in told
    assert "data.system_prompt: is for" in message(path, classes, "data.instruction=Is {text} good", "data.system_prompt=Be brief.")
    assert "data.template: chat needs data.instruction in a classification" in message(path, classes, "data.template=chat")
    read = ["data.template=chat", "data.system_prompt=Be brief."]
    both = load_config(path, [classes, "data.instruction=Is {text} good", *read])
    assert both.data.system_prompt == load_config(path, read).data.system_prompt == "Be brief."
    assert load_config(path, [classes, "data.instruction=Is {text} good"]).data.template == "question_answer"
