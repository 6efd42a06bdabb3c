"""A merge says which heads it left out and keeps nothing that speaks of them; heads of several tasks are never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import pico
from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.fingerprint import fingerprint
from speft_core.multihead_files import load_heads
from speft_hub.cli import app
from speft_hub.combining import merge_adapters, multihead
from speft_hub.console import run
from speft_hub.convert import convert
from speft_hub.export import export

NAME = "model.layers.0.self_attn.q_proj.weight"


def save(folder: Path, base: Path, head: dict[str, torch.Tensor], at: int, **config: Any) -> None:
    """An adapter of the pico Llama in `base`, with a head and a classifier's config.json as a training run writes it."""
    weight = dict(pico.llama().named_parameters())[NAME]
    indices = torch.tensor([at, at + 40], dtype=torch.int32)
    made = AdapterConfig(base_model_name_or_path=str(base), task_type="SEQ_CLS")
    SparseAdapter({NAME: SparseDelta(indices, torch.ones(2), (16, 16))}, head, made, {NAME: fingerprint(weight, indices)}).save(folder)
    own = LlamaForSequenceClassification(pico.llama().config).config
    own.architectures = ["LlamaForSequenceClassification"]
    for key, value in config.items():
        setattr(own, key, value)
    own.save_pretrained(folder)


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Two classifiers of one base, with heads that differ."""
    pico.llama().save_pretrained(tmp_path / "base")
    for i, labels in enumerate(({0: "bad", 1: "good"}, {0: "wrong", 1: "right"})):
        fields = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}, "problem_type": "single_label_classification"}
        save(tmp_path / f"t{i}", tmp_path / "base", {"score.weight": torch.randn(2, 16)}, i, **fields)
    return [str(tmp_path / f"t{i}") for i in range(2)]


def test_heads_that_differ_are_told_and_nothing_of_them_is_kept(
    tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, ["merge", *tasks, "--out", str(tmp_path / "both"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["heads_left_apart"] == ["score.weight"]
    assert said.err.startswith("note: left out, because the adapters differ in it: score.weight;") and said.err.count("\n") == 1
    adapter = SparseAdapter.load(tmp_path / "both")
    assert adapter.dense == {} and adapter.config.task_type is None
    card = (tmp_path / "both/README.md").read_text()
    assert "Left out, because the sources differ in it: score.weight." in card and "text-classification" not in card
    config = json.loads((tmp_path / "both/config.json").read_text())
    assert config["model_type"] == "llama"
    assert not config.keys() & {"id2label", "label2id", "num_labels", "problem_type", "architectures"}
    export(tmp_path / "both", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert exported.architectures == ["LlamaForCausalLM"] and "bad" not in (tmp_path / "out/config.json").read_text()


def test_heads_that_agree_keep_their_labels_without_a_word(
    tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, ["merge", tasks[0], tasks[0], "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "both/config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    adapter = SparseAdapter.load(tmp_path / "both")
    assert adapter.dense.keys() == {"score.weight"} and adapter.config.task_type == "SEQ_CLS"
    assert "Left out" not in (tmp_path / "both/README.md").read_text()


def test_heads_of_several_tasks_are_not_lost(tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    multihead(tasks, tmp_path / "many", ["mood", "grammar"])
    capsys.readouterr()
    for command in ("merge", "multihead"):
        assert run(app, [command, str(tmp_path / "many"), tasks[0], "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "many has heads of several tasks (mood, grammar)" in said and said.count("\n") == 1
    with pytest.raises(UserError, match=r"several tasks \(mood, grammar\)"):
        convert(tmp_path / "many", tmp_path / "out", to="shira")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "problem, outputs, kind",
    [
        (None, 1, "regression"),
        (None, 2, "classification"),
        ("regression", 1, "regression"),
        ("regression", 3, "regression"),
        ("multi_label_classification", 1, "classification"),
    ],
)
@pytest.mark.parametrize("last", ["classifier", "classifier.out_proj"])
def test_the_kind_follows_the_outputs_wherever_the_last_layer_is(
    tmp_path: Path, last: str, outputs: int, problem: str | None, kind: str
) -> None:
    """DistilBERT's pre_classifier comes behind its classifier in the file, RoBERTa's classifier.dense before its out_proj."""
    inner = "pre_classifier" if last == "classifier" else "classifier.dense"
    head = {f"{inner}.weight": torch.randn(16, 16), f"{inner}.bias": torch.randn(16)}
    head |= {f"{last}.weight": torch.randn(outputs, 16), f"{last}.bias": torch.randn(outputs)}
    names = {i: f"LABEL_{i}" for i in range(outputs)}
    save(tmp_path / "a", tmp_path / "base", head, 0, problem_type=problem, id2label=names, label2id={v: k for k, v in names.items()})
    assert multihead([str(tmp_path / "a")], tmp_path / "many") == {"a": kind}
    assert load_heads(tmp_path / "many")[1] == {"a": kind}


def test_a_merge_without_heads_is_as_it_was(tmp_path: Path, tasks: list[str]) -> None:
    for task in tasks:
        adapter = SparseAdapter.load(task)
        SparseAdapter(adapter.deltas, {}, adapter.config, adapter.fingerprint).save(task)
    rows, apart = merge_adapters(tasks, tmp_path / "both")
    assert apart == [] and rows[0].merged == 4 and not list(tmp_path.glob(".*"))


def test_a_merge_of_classifiers_is_loaded_as_one(tmp_path: Path, tasks: list[str]) -> None:
    """Its task is open without a head, but its tensors are called as in a classifier."""
    merge_adapters(tasks, tmp_path / "both")
    card = (tmp_path / "both/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "CausalLM" not in card and "vllm" not in card


def test_other_dense_tensors_that_differ_take_no_task_along(
    tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        save(tmp_path / f"n{i}", tmp_path / "base", {"model.norm.weight": torch.full((16,), 1.0 + i)}, i)
    assert run(app, ["merge", str(tmp_path / "n0"), str(tmp_path / "n1"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "note: left out, because the adapters differ in it: model.norm.weight\n"
    assert SparseAdapter.load(tmp_path / "out").config.task_type == "SEQ_CLS"
    assert "architectures" in json.loads((tmp_path / "out/config.json").read_text())


def test_heads_that_are_the_models_own_are_no_loss(tmp_path: Path, tasks: list[str]) -> None:
    for i in range(2):
        save(tmp_path / f"n{i}", tmp_path / "base", {}, i)
    multihead([str(tmp_path / f"n{i}") for i in range(2)], tmp_path / "many", ["a", "b"])
    assert load_heads(tmp_path / "many")[0] == {"a": {}, "b": {}}
    merge_adapters([str(tmp_path / "many"), tasks[0]], tmp_path / "out")
    assert SparseAdapter.load(tmp_path / "out").nnz == 4
