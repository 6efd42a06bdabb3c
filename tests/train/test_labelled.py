"""Labelled data that a run cannot use: one line that names the place, before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pico_tokenizers
from pico_run import make_config, make_model
from speft_core.errors import UserError
from speft_train import cli

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template takes no system prompt, as Gemma's."""
    folder = make_model(tmp_path_factory.mktemp("model"))
    tokenizer = pico_tokenizers.byte_level()
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(folder)
    return folder


def config(folder: Path, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: dict[str, Any] = {"model": {"task": "sequence_classification"}, "adapter": {"metric": "magnitude"}, **sections}
    made["data"] = {"train": str(file), "validation_from_train": 4, **made.get("data", {})}
    return make_config(folder / "c.yaml", model, folder / "run", **made)


def test_a_chat_template_that_refuses_names_file_and_row(tmp_path: Path, model: Path) -> None:
    rows = [{"text": f"a{n}", "label": n % 2} for n in range(24)]
    path = config(tmp_path, model, rows, data={"template": "chat", "instruction": "Is {text} good?"})
    with pytest.raises(
        UserError, match=r"rows.jsonl row 1: .*chat template refuses turns of system, user: System role not supp"
    ):
        cli.execute(path, ["data.system_prompt=Be brief."], dry_run=False)
    assert not (tmp_path / "run/stages.json").exists()
    cli.execute(path, [], dry_run=False)  # without one, in the same folder


@pytest.mark.parametrize(("labels", "metric"), [((0, 1), "pearson"), ((0.5, 1.5), "eval_accuracy")])
def test_the_best_is_not_chosen_by_a_figure_that_these_labels_do_not_have(
    tmp_path: Path, model: Path, labels: tuple[float, float], metric: str
) -> None:
    """The config cannot tell whether labels are classes or numbers; the data do."""
    rows = [{"text": f"a{n}", "label": labels[n % 2]} for n in range(24)]
    train = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": metric}
    with pytest.raises(UserError, match=f"train.metric_for_best_model: must be one of loss, .*got '{metric}'"):
        cli.execute(config(tmp_path, model, rows, train=train), [], dry_run=False)
    assert not (tmp_path / "run/stages.json").exists()
