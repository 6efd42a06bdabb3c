"""Multiple choice by likelihood, against a plain loop; and as a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import pico_tokenizers
from pico_run import make_config, make_model
from speft_core.errors import UserError
from speft_train import cli, results
from speft_train.config import from_mapping
from speft_train.data.templates import right_choice
from speft_train.evaluate import choose
from speft_train.folder import RunFolder

ROWS: list[dict[str, Any]] = [
    {"question": f"What is {place}?", "choices": ["one", "a much longer one", "B"][: 2 + place % 2], "answer": place % 2}
    for place in range(6)
]


def test_it_is_the_likelihood_of_each_choice_alone() -> None:
    tokenizer = pico_tokenizers.byte_level()
    model = pico.llama(vocab_size=len(tokenizer))
    wanted, per_character = 0, 0
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            ids = prompt + tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logs[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
        wanted += sums.index(max(sums)) == row["answer"]
        means = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
        per_character += means.index(max(means)) == row["answer"]
    data = {"train": "x.jsonl", "template": "multiple_choice"}
    cfg = from_mapping({"output_dir": "x", "model": {"name": "x"}, "data": data, "adapter": {"method": "full"}})
    found = choose(model, tokenizer, ROWS, cfg, progress=False)
    assert (found["accuracy"], found["accuracy_per_character"]) == (wanted / 6, per_character / 6)
    assert found["count"] == 6


@pytest.mark.parametrize(("answer", "place"), [(1, 1), ("1", 1), ("B", 1), ("a", 0)])
def test_an_answer_is_a_place_or_a_letter(answer: Any, place: int) -> None:
    assert right_choice({"choices": ["x", "y"], "answer": answer}) == place


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": "xy", "answer": 0}, "a list of at least two texts"),
        ({"choices": ["x", "y"], "answer": 2}, "from 0 to 1, or its letter; got 2"),
        ({"choices": ["x", "y"], "answer": None}, "got None"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        right_choice(row)


def test_a_run_on_multiple_choice(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    sections: dict[str, Any] = {
        "data": {"train": str(data), "test": str(data), "template": "multiple_choice", "train_size": 16}
    }
    config = make_config(tmp_path / "c.yaml", make_model(tmp_path / "model"), tmp_path / "run", **sections)
    cli.execute(config, [], dry_run=False)
    found = results.read(RunFolder(tmp_path / "run"))
    assert {"accuracy", "accuracy_per_character", "loss"} <= set(found["adapted"])
    assert found["adapted"]["count"] == 4 and "exact_match" not in found["adapted"]
