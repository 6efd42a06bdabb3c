"""On which rows a run measures what; a run that has nothing to measure, or cannot be trained, is told so before its model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pico_run import make_config, make_model
from speft_train import cli, results
from speft_train.folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs"
EXECUTE = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A model whose weights nobody can load: what is told of it is told before."""
    folder = tmp_path_factory.mktemp("no_weights")
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"How many are {n}?", "answer": f"#### {n}"} for n in range(start, start + count)]


def alpaca(count: int) -> list[dict[str, Any]]:
    """As tatsu-lab/alpaca: most rows have no input, and a few have no output."""
    rows = [{"instruction": f"Say {n}.", "input": "now" * (n % 3 == 0), "output": f"{n} it is"} for n in range(count)]
    for place in (5, 17, count - 2):
        rows[place]["output"] = ""
    return rows


@pytest.fixture
def execute(tmp_path: Path, model: Path) -> EXECUTE:
    def run(**sections: Any) -> dict[str, Any]:
        config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", **sections)
        cli.execute(config, [], dry_run=False)
        return results.read(RunFolder(tmp_path / "run"))

    return run


def refused(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that the run ends with; no stage has been recorded, so another config may follow in its folder."""
    assert cli.guarded(lambda: cli.execute(config, list(overrides), dry_run=False)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not (config.parent / "run/stages.json").exists()
    return lines[0]


def test_the_config_of_the_readme_runs_on_data_like_alpaca(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, the data's place and the sizes are other ones; the rest is the config's."""
    data = write(tmp_path / "alpaca.jsonl", alpaca(60))
    small = [
        f"output_dir={tmp_path / 'run'}", f"model.name={model}", f"data.train={data}", "data.validation_from_train=10",
        "data.max_length=256", "adapter.budget.k=200", "adapter.calibration_examples=8", "train.num_train_epochs=1",
    ]  # fmt: skip
    cli.execute(CONFIGS / "qwen2_7b_alpaca.yaml", small, dry_run=False)
    found = results.read(RunFolder(tmp_path / "run"))
    assert found["steps"] == 3 and found["trainable_parameters"] == 200  # 48 rows are left of 50
    assert found["adapted"]["split"] == "validation" and found["adapted"]["count"] == 9
    assert "exact_match" not in found["adapted"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("train: 48 examples") == 1 and "2 left out, output empty" in said
    assert "validation: 9 examples" in said and "1 left out, output empty" in said


def test_without_test_data_the_validation_rows_are_measured_and_named(tmp_path: Path, model: Path, execute: EXECUTE) -> None:
    rows = pairs(30)
    found = execute(data={"train": write(tmp_path / "d.jsonl", rows), "validation_from_train": 6})
    assert found["adapted"]["split"] == found["base"]["split"] == "validation"
    assert found["adapted"]["count"] == 6 and {"exact_match", "loss", "perplexity"} <= set(found["adapted"])
    for file in ("report.md", "adapter/README.md"):
        text = (tmp_path / "run" / file).read_text()
        assert "| validation examples | 6 | 6 |" in text and "test examples" not in text


def test_the_figures_of_validation_rows_are_those_of_the_same_rows_as_test_rows(tmp_path: Path, execute: EXECUTE) -> None:
    rows = pairs(30)
    train, test = write(tmp_path / "train.jsonl", rows[:24]), write(tmp_path / "test.jsonl", rows[24:])
    quick = {"adapter": {"metric": "magnitude"}, "evaluate": {"generation": False}}
    held = execute(data={"train": write(tmp_path / "d.jsonl", rows), "validation_from_train": 6}, **quick)
    (tmp_path / "run").rename(tmp_path / "held")
    plain = execute(data={"train": train, "test": test, "test_size": 6}, **quick)
    assert held["digest"] == plain["digest"]
    assert {**plain["adapted"], "split": "validation"} == held["adapted"]


def test_test_data_are_measured_where_there_are_both(tmp_path: Path, execute: EXECUTE) -> None:
    test = write(tmp_path / "t.jsonl", pairs(3, 40))
    found = execute(
        data={"train": write(tmp_path / "d.jsonl", pairs(30)), "test": test, "validation_from_train": 6},
        evaluate={"generation": False},
    )
    assert "split" not in found["adapted"] and found["adapted"]["count"] == 3
    assert "| test examples | 3 | 3 |" in (tmp_path / "run/report.md").read_text()


def test_choices_are_scored_on_validation_rows_too(tmp_path: Path, execute: EXECUTE) -> None:
    rows = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": n % 2} for n in range(20)]
    data = {"train": write(tmp_path / "d.jsonl", rows), "template": "multiple_choice", "validation_from_train": 4}
    found = execute(data=data, adapter={"metric": "magnitude"})
    assert found["adapted"]["split"] == "validation" and found["adapted"]["count"] == 4 and "accuracy" in found["adapted"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"train": "d.jsonl", "test": None}}, "set data.test, data.validation or data.validation_from_train"),
        (
            {"data": {"train": "d.jsonl", "test": None}, "model": {"task": "sequence_classification"}},
            "set data.test, data.validation or data.validation_from_train",
        ),
        ({"evaluate": {"generation": False, "loss": False}}, "set one of evaluate.generation and evaluate.loss"),
    ],
)
def test_nothing_to_measure_is_told_from_the_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], words: str
) -> None:
    """Neither the model nor the data exist, and no folder is made."""
    config = make_config(tmp_path / "c.yaml", tmp_path / "no-model", tmp_path / "run", **sections)
    told = refused(config, capsys)
    assert "evaluate has nothing to measure" in told and words in told and "evaluate.enabled=false" in told
    assert not (tmp_path / "run").exists()


def test_a_mask_alone_needs_nothing_to_measure(tmp_path: Path, model: Path) -> None:
    from speft_train import masks

    data = {"train": write(tmp_path / "d.jsonl", pairs(20))}
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", data=data, train={"global_batch_size": 400})
    masks.find(config, [], tmp_path / "mask.safetensors")
    assert (tmp_path / "mask.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"evaluate": {"generation": False}, "data": {"max_length": 44}},
            "every test example is longer than data.max_length (44)",
        ),
        ({"data": {"test_rows": [{"question": "a", "answer": "none"}]}}, "'none' has none"),
        ({"train": {"global_batch_size": 64}}, "must fill one global batch of 64; got 20 examples"),
        (
            {"train": {"eval_strategy": "steps"}, "data": {"validation_rows": [{"question": "a" * 300, "answer": "1"}]}},
            "every validation example is longer than data.max_length (256)",
        ),
        (
            {"evaluate": {"validation": True}, "data": {"validation_rows": [{"question": "a", "answer": "nothing"}]}},
            "'nothing' has none",
        ),
        (
            {
                "evaluate": {"validation": True, "generation": False},
                "data": {"validation_rows": [{"question": "a" * 300, "answer": "1"}]},
            },
            "every validation example is longer than data.max_length (256)",
        ),
        ({"data": {"test_rows": [{"question": "a", "answer": ""}] * 2}}, "answer is empty in all of them (2)"),
        ({"data": {"rows": [{"question": "", "answer": "1"}] * 9}}, "question is empty in all of them (9)"),
        ({"data": {"rows": [*pairs(9), {"question": "a"}]}}, "row 10: answer must be text that is not empty; got None"),
    ],
)
def test_what_the_data_tell_is_told_before_the_model_is_loaded(
    tmp_path: Path, no_weights: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: str
) -> None:
    data = dict(settings.get("data", {}))
    train = write(tmp_path / "train.jsonl", data.pop("rows", pairs(20)))
    test = write(tmp_path / "test.jsonl", data.pop("test_rows", pairs(4, 10**6)))
    if "validation_rows" in data:
        data["validation"] = write(tmp_path / "validation.jsonl", data.pop("validation_rows"))
    config = make_config(
        tmp_path / "c.yaml", no_weights, tmp_path / "run", **{**settings, "data": {"train": train, "test": test, **data}}
    )
    assert words in refused(config, capsys)
    assert "cannot be loaded" in refused(make_config(config, no_weights, tmp_path / "run"), capsys), "the weights do not exist"


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (6, ["train.global_batch_size=16"], "global_batch_size must be a multiple of the number of processes (6); got 16"),
        (1, ["train.global_batch_size=16", "train.per_device_train_batch_size=5"], "(5 x 1); got 16"),
        (1, ["train.eval_strategy=steps"], "train.eval_strategy needs data.validation or data.validation_from_train"),
    ],
)
def test_batches_and_validation_are_checked_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: int,
    overrides: list[str],
    words: str,
) -> None:
    for name, value in (("RANK", 0), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    config = make_config(tmp_path / "c.yaml", tmp_path / "no-model", tmp_path / "run")
    assert words in refused(config, capsys, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            {"eval_strategy": "epoch", "save_strategy": "steps", "load_best_model_at_end": True},
            "save and eval strategy to match",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers > 0"),
    ],
)
def test_what_transformers_refuses_is_told_before_the_model_is_loaded(
    tmp_path: Path, no_weights: Path, capsys: pytest.CaptureFixture[str], train: dict[str, Any], words: str
) -> None:
    config = make_config(tmp_path / "c.yaml", no_weights, tmp_path / "run", train=train, data={"validation_from_train": 8})
    told = refused(config, capsys)
    assert "train: transformers refuses these settings" in told and words in told


def test_the_measured_loss_is_that_of_the_answers_also_when_prompts_are_learnt(tmp_path: Path, execute: EXECUTE) -> None:
    """At a learning rate of nearly nothing the base's figures are the same; what was trained on is not."""
    still = {"train": {"learning_rate": 1e-12}, "evaluate": {"generation": False}, "adapter": {"metric": "magnitude"}}
    rows = {"train": write(tmp_path / "d.jsonl", pairs(30)), "validation_from_train": 6}
    plain = execute(data=rows, **still)
    (tmp_path / "run").rename(tmp_path / "plain")
    prompts = execute(data={**rows, "prompt_loss": True}, **still)
    assert prompts["base"] == plain["base"]
    assert prompts["history"][0]["loss"] != plain["history"][0]["loss"]
