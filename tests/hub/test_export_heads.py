"""An exported head of a multi-head folder answers with its own task's labels, and as its own kind of problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

import pico
from speft_core import AdapterConfig, MultiHeadModel, SparseAdapter, SparseDelta, UserError
from speft_core.fingerprint import fingerprint
from speft_hub.combining import multihead
from speft_hub.export import export
from speft_hub.pulling import check_folder

TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "sentiment": (2, {"id2label": {0: "negative", 1: "positive"}, "problem_type": "single_label_classification"}),
    "grammar": (2, {"id2label": {0: "wrong", 1: "right"}, "problem_type": "single_label_classification"}),
    "topics": (2, {"id2label": {0: "sports", 1: "politics"}, "problem_type": "multi_label_classification"}),
    "score": (1, {"id2label": {0: "LABEL_0"}, "problem_type": "regression"}),
}


def made(root: Path, tasks: dict[str, tuple[int, dict[str, Any]]]) -> list[str]:
    """An adapter for each task, with the config.json that a training run writes; the base in `base`."""
    base = pico.llama()
    base.save_pretrained(root / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(base.named_parameters())[name]
    for i, (task, (labels, fields)) in enumerate(tasks.items()):
        indices = torch.tensor([i, 40 + i], dtype=torch.int32)
        delta = SparseDelta(indices, torch.ones(2), tuple(weight.shape))
        config = AdapterConfig(base_model_name_or_path=str(root / "base"), task_type="SEQ_CLS")
        head = {"score.weight": torch.randn(labels, pico.HIDDEN)}
        SparseAdapter({name: delta}, head, config, {name: fingerprint(weight, indices)}).save(root / task)
        if fields:
            own = LlamaForSequenceClassification.from_pretrained(root / "base", num_labels=labels).config
            own.id2label, own.problem_type = fields["id2label"], fields["problem_type"]
            own.label2id = {name: place for place, name in own.id2label.items()}
            own.save_pretrained(root / task)
    return [str(root / task) for task in tasks]


def exported(root: Path, head: str) -> Any:
    export(root / "many", root / "out", head=head, force=True)
    return AutoModelForSequenceClassification.from_pretrained(root / "out").eval().config


@pytest.mark.parametrize("order", [list(TASKS), list(TASKS)[::-1]])
def test_each_head_keeps_its_labels_and_its_problem(tmp_path: Path, order: list[str]) -> None:
    multihead(made(tmp_path, {t: TASKS[t] for t in order}), tmp_path / "many")
    check_folder(tmp_path / "many")
    for again in (False, True):
        for task, (_, fields) in TASKS.items():
            config = exported(tmp_path, task)
            assert (config.id2label, config.problem_type) == (fields["id2label"], fields["problem_type"])
            assert config.label2id == {name: place for place, name in config.id2label.items()}
        if not again:  # a model that is loaded and saved keeps them, too
            with MultiHeadModel.load(tmp_path / "many", pico.llama()) as heads:
                heads.save(tmp_path / "many")


def test_a_head_without_a_record_has_no_other_ones_labels(tmp_path: Path) -> None:
    tasks = {"sentiment": TASKS["sentiment"], "unknown": (2, {}), "number": (1, {})}
    multihead(made(tmp_path, tasks), tmp_path / "many")
    entries = json.loads((tmp_path / "many/heads.json").read_text())["heads"]
    assert "id2label" not in entries["unknown"] and "problem_type" not in entries["unknown"]
    for entry in entries.values():  # a folder of before these keys
        entry.pop("id2label", None), entry.pop("problem_type", None)
    for task, (labels, _) in tasks.items():
        config = exported(tmp_path, task)
        if task == "sentiment":
            assert config.id2label == TASKS["sentiment"][1]["id2label"]
        else:
            assert config.id2label == {i: f"LABEL_{i}" for i in range(labels)} and config.problem_type is None
    (tmp_path / "many/heads.json").write_text(json.dumps({"format_version": 1, "heads": entries}))
    config = exported(tmp_path, "sentiment")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and config.problem_type is None


@pytest.mark.parametrize(
    "key, value",
    [
        ("id2label", ["a", "b"]),
        ("id2label", {"0": "a", "2": "b"}),
        ("id2label", {"0": "a"}),
        ("id2label", {"0": "a", "1": 3}),
        ("problem_type", "magic"),
        ("problem_type", ["regression"]),
    ],
)
def test_damaged_labels_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    multihead(made(tmp_path, {t: TASKS[t] for t in ("sentiment", "grammar")}), tmp_path / "many")
    record = json.loads((tmp_path / "many/heads.json").read_text())
    record["heads"]["grammar"][key] = value
    (tmp_path / "many/heads.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"'grammar'.*{key}"):
        check_folder(tmp_path / "many")
