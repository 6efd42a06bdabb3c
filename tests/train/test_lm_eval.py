"""`speft-train eval` on a pico model: local tasks, base beside adapted beside exported, code that is run only when asked."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import speft_core as sc
from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import cli
from speft_train.lm import local, rows, run, subjects

SUM = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(2, 3) == 5\n", "entry_point": "add"}


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sums = [{"question": f"{a} and 2?", "answer": f"It is {a + 2}.\n#### {a + 2}"} for a in range(6)]
    write(folder / "gsm8k/train.jsonl", *sums[:3])
    write(folder / "gsm8k/test.jsonl", *sums[3:])
    asked = [
        {"question": f"Which {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4, "subject": subject}
        for subject, count in (("high_school_maths", 3), ("law", 2)) for n in range(count)
    ]  # fmt: skip
    write(folder / "mmlu/train.jsonl", *asked)
    write(folder / "mmlu/test.jsonl", *asked)
    write(folder / "humaneval/test.jsonl", {"task_id": "HumanEval/0", **SUM})
    tests = {"text": "Add two numbers.", "test_list": ["assert add(1, 1) == 2", "assert add(2, 3) == 5"], "test_setup_code": ""}
    write(folder / "mbpp/train.jsonl", {"task_id": 2, "code": "def add(a, b):\n    return a + b", **tests})
    write(folder / "mbpp/test.jsonl", {"task_id": 3, "code": "", **tests})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and beside it the same as a plain checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trained")
    base = make_model(folder / "model", max_position_embeddings=1024)
    train = {"max_steps": 3, "learning_rate": 0.1}
    config = make_config(folder / "run.yaml", base, folder / "run", train=train, evaluate={"enabled": False})
    cli.execute(config, [], dry_run=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    with sc.SparseAdapter.load(folder / "run/adapter").applied(model):
        model.save_pretrained(folder / "exported")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "exported")
    return folder


def test_base_adapted_and_exported_side_by_side(tmp_path: Path, data: Path, trained: Path) -> None:
    settings = run.Settings(tasks=["gsm8k", "mmlu"], num_fewshot=1, limit=2, data=data, output=tmp_path / "out")
    console = Console(width=200, record=True)
    paths = [str(trained / "run"), str(trained / "exported")]
    found = run.evaluate(paths, settings, console)["columns"]
    assert list(found) == ["base", "run", "exported"]
    assert found["run"] == found["exported"], "in place and exported are the same model"
    assert {"exact_match,strict-match", "exact_match,flexible-extract", "n"} <= set(found["run"]["gsm8k"])
    assert found["run"]["gsm8k"]["n"] == 2 and found["run"]["mmlu"]["n"] == 4
    assert {"acc,none", "acc_stderr,none"} <= set(found["run"]["mmlu"])
    assert found["run"]["mmlu_law"]["in"] == "mmlu"
    written = json.loads((tmp_path / "out/eval.json").read_text())
    assert written["columns"] == found and written["num_fewshot"] == 1 and written["limit"] == 2
    table = (tmp_path / "out/eval.md").read_text()
    assert "| task | metric | n | base | run | exported |" in table and "mmlu_law" not in table
    assert "| mmlu | acc | 4 | " in table and "±" in table
    answers = [json.loads(line) for line in (tmp_path / "out/samples-run-gsm8k.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "out/samples-base-gsm8k.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and [a["resps"] for a in answers] != [a["resps"] for a in again]


def test_a_column_that_is_done_stays_when_the_next_one_fails(
    tmp_path: Path, data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = run._score

    def fails(model: Any, *rest: Any) -> Any:
        if (tmp_path / "out/eval.json").exists():
            raise RuntimeError("out of memory")
        return score(model, *rest)

    monkeypatch.setattr(run, "_score", fails)
    settings = run.Settings(tasks=["gsm8k"], num_fewshot=0, limit=1, data=data, output=tmp_path / "out")
    with pytest.raises(RuntimeError, match="out of memory"):
        run.evaluate([str(trained / "run")], settings, Console(quiet=True))
    assert list(json.loads((tmp_path / "out/eval.json").read_text())["columns"]) == ["base"]
    assert (tmp_path / "out/samples-base-gsm8k.jsonl").is_file() and "| base |" in (tmp_path / "out/eval.md").read_text()


def test_code_is_generated_and_not_run_unless_asked(
    tmp_path: Path, data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rows.ALLOW, "1")  # only the option allows it
    ran: list[str] = []
    monkeypatch.setattr(rows, "passes", lambda program: bool(ran.append(program)) or True)
    arguments = ["eval", str(trained / "run/adapter"), "--tasks", "humaneval,mbpp", "--data", str(data), "--no-base"]
    done = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / "out"), "--num-fewshot", "0"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert not ran and "Generated code was not run" in done.output
    found = json.loads((tmp_path / "out/eval.json").read_text())["columns"]["run"]
    assert set(found) == {"humaneval", "mbpp"} and "generated,none" in found["mbpp"]
    assert (tmp_path / "out/samples-run-mbpp.jsonl").is_file()
    done = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / "run"), "--execute-code", "--num-fewshot", "0"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(ran) == 2 and ran[0].startswith(SUM["prompt"]) and ran[0].endswith("check(add)\n")
    assert "assert add(2, 3) == 5" in ran[1]
    assert json.loads((tmp_path / "run/eval.json").read_text())["columns"]["run"]["mbpp"]["pass@1,none"] == 1.0


def test_what_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.ALLOW, "1")
    monkeypatch.setattr(rows, "SECONDS", 2)
    assert rows.humaneval_results(SUM, ["    return a + b\n"]) == {"pass@1": 1.0}
    for wrong in ("    return a - b\n", "    return a +\n", "    import sys; sys.exit(0)\n", "    while True: pass\n"):
        assert rows.humaneval_results(SUM, [wrong]) == {"pass@1": 0.0}, wrong
    assert rows.mbpp_results({"test_list": ["assert f() == 1"]}, ["def f():\n    print('1')\n    return 1"]) == {"pass@1": 1.0}
    assert not rows.passes("import os; open('x', 'w').write('a' * (1 << 21))"), "files are limited"
    assert rows.passes("import os; assert 'HOME' not in os.environ and not os.listdir('.')")


def test_a_task_file_of_ones_own(tmp_path: Path, data: Path) -> None:
    (tmp_path / "mine.yaml").write_text((local.OWN / "gsm8k.yaml").read_text().replace("task: gsm8k", "task: mine"))
    (tmp_path / "tasks").mkdir()
    assert local.prepare([str(tmp_path / "mine.yaml"), "gsm8k"], data, tmp_path / "tasks") == (["mine", "gsm8k"], False)
    assert str(data / "gsm8k/test.jsonl") in (tmp_path / "tasks/mine.yaml").read_text()
    assert local.prepare(["gsm8k"], None, tmp_path / "tasks") == (["gsm8k"], True), "without local data it is lm-eval's"


def test_every_task_that_comes_along_names_its_files(tmp_path: Path, data: Path) -> None:
    assert local.names() == ["arc_easy", "gsm8k", "humaneval", "mbpp", "mmlu"]
    for name in ("gsm8k", "humaneval", "mbpp", "mmlu"):
        assert local.prepare([name], data, tmp_path) == ([name], False)
    with pytest.raises(UserError, match="arc_easy needs .*arc_easy/train.jsonl, which does not exist"):
        local.prepare(["arc_easy"], data, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all", "--tasks", "gsm8k"], "there is no such folder"),
        (["{run}", "--tasks", "gsm8k", "--data", "{run}/nowhere"], "--data must be a folder"),
        (["{run}", "--tasks", "gsm8k", "--output", "{run}/config.yaml"], "--output must be a folder"),
        (["{run}", "--tasks", "none.yaml"], "none.yaml does not exist"),
        (["{run}", "--tasks", "mmul", "--data", "{data}"], "lm-eval has no task 'mmul'. Did you mean 'mmlu'?"),
        (["{run}/adapter/..", "--tasks", "gsm8k", "--model", "/nowhere", "--data", "{data}"], "model folder /nowhere does not exist"),
        (["{data}", "--tasks", "gsm8k"], "it holds none of their files"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(data: Path, trained: Path, arguments: list[str], words: str) -> None:
    filled = [part.format(run=trained / "run", data=data) for part in arguments]
    done = CliRunner().invoke(cli.app, ["eval", *filled])
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()) and done.stderr.count("\n") == 1, done.stderr


def test_classifiers_are_not_lm_evals(tmp_path: Path, trained: Path) -> None:
    text = (trained / "run/config.yaml").read_text().replace("task: causal_lm", "task: sequence_classification")
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(UserError, match="lm-eval scores causal models"):
        subjects.subjects([str(tmp_path / "run")], None, None)


def test_names_of_columns() -> None:
    assert subjects._names(["runs/a", "runs/b/adapter"]) == ["a", "b"]
    assert subjects._names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert os.environ.get(rows.ALLOW) != "1"


def test_one_model_is_in_memory_at_a_time(data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speft_train import models

    load, seen, alive = models.load_model, list[weakref.ref[Any]](), list[int]()

    def watched(*given: Any, **named: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        made = load(*given, **named)
        seen.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(models, "load_model", watched)
    settings = run.Settings(tasks=["gsm8k"], num_fewshot=0, limit=1, data=data)
    run.evaluate([str(trained / "run/adapter"), str(trained / "exported"), str(trained / "model")], settings, Console(quiet=True))
    assert alive == [0, 0, 0] and all(ref() is None for ref in seen)


def test_a_run_called_base_does_not_take_the_bases_column(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "runs/base")
    settings = run.Settings(tasks=["gsm8k"], num_fewshot=0, limit=1, data=data, output=tmp_path / "out")
    found = run.evaluate([str(tmp_path / "runs/base")], settings, Console(quiet=True))["columns"]
    assert list(found) == ["base", "runs/base"]
    files = {file.name: file.read_text() for file in (tmp_path / "out").glob("samples-*.jsonl")}
    assert set(files) == {"samples-base-gsm8k.jsonl", "samples-runs_base-gsm8k.jsonl"} and len(set(files.values())) == 2


def test_names_of_columns_are_not_the_bases() -> None:
    assert subjects._names(["runs/base"]) == ["runs/base"] and subjects._names(["runs/base", "runs/b"]) == ["runs/base", "runs/b"]
    assert subjects._names(["base"]) == ["./base"], "a folder here, or a model of the Hub"
    assert subjects._names(["base", "x/base"]) == ["./base", "x/base"]
    assert run._slugs(["base", "a/b", "a_b"]) == {"base": "base", "a/b": "a_b", "a_b": "a_b_2"}


def test_examples_of_groups_within_groups_are_counted() -> None:
    """As lm-eval has MMLU: mmlu has mmlu_stem, which has subjects; a task in two groups counts once."""
    tasks = {"algebra": 3, "physics": 4, "law": 5}
    groups = {"mmlu": ["stem", "science", "other"], "stem": ["algebra", "physics"], "science": ["physics"], "other": ["law"], "none": []}
    result = {
        "results": {name: {"acc,none": 0.5, "sample_len": 1} for name in (*tasks, *groups)},
        "groups": {name: {"acc,none": 0.5} for name in groups},
        "group_subtasks": groups,
        "n-samples": {task: {"original": 9, "effective": count} for task, count in tasks.items()},
    }
    found = run._figures(result)
    assert {name: found[name]["n"] for name in groups if name != "none"} == {"mmlu": 12, "stem": 7, "science": 4, "other": 5}
    assert [task for task, *_ in run.cells({"base": found})] == ["mmlu", "none"]
