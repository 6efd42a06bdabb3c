"""The config.json of an export is the base's: of the adapter's, which anybody may have published, only what its head needs is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import pico
from hub.exported import adapter_for
from speft_hub.export import export

HEAD = {"score.weight": torch.ones(3, pico.HIDDEN)}
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def exported(
    root: Path, own: dict[str, Any], base: dict[str, Any] | None = None, dense: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of an export whose adapter and whose base have these keys in theirs."""
    model = pico.llama()
    model.save_pretrained(root / "base")
    settings = json.loads((root / "base/config.json").read_text())
    (root / "base/config.json").write_text(json.dumps(settings | (base or {})))
    adapter_for(model, str(root / "base"), dense=dense).save(root / "adapter")
    (root / "adapter/config.json").write_text(json.dumps({k: v for k, v in (settings | own).items() if v is not ...}))
    export(root / "adapter", root / "out", force=True)
    made: dict[str, Any] = json.loads((root / "out/config.json").read_text())
    if "auto_map" not in made:
        AutoConfig.from_pretrained(root / "out")
    return made


@pytest.mark.parametrize("dense", [None, HEAD])
def test_nothing_but_the_head_is_the_adapters(tmp_path: Path, dense: dict[str, Any] | None) -> None:
    """Code of the adapter's author in a configuration that people load who trust the base; settings of a training run."""
    hostile = {
        "auto_map": {"AutoModelForCausalLM": "mallory/evil--modeling.Evil", "AutoConfig": "mallory/evil--configuration.Evil"},
        "custom_pipelines": {"text-generation": {"impl": "mallory/evil--pipeline.Evil", "pt": ["AutoModelForCausalLM"]}},
        "use_cache": False, "hidden_act": "relu", "rope_theta": 7.0, "quantization_config": {"quant_method": "x"},
        "_name_or_path": "/home/mallory/base", "eos_token_id": 5, "dtype": "float16", "unknown": {"auto_map": 1},
        "classifier_evil": {"auto_map": {}},
    }  # fmt: skip
    honest = exported(tmp_path, {}, dense=dense)
    assert exported(tmp_path, hostile, dense=dense) == honest
    assert honest["use_cache"] is True and "auto_map" not in honest


def test_labels_and_the_layout_of_the_head_are(tmp_path: Path) -> None:
    own = LABELS | {"problem_type": "single_label_classification", "pad_token_id": 9, "classifier_pooling": "mean"}
    made = exported(tmp_path, own | {"architectures": ["LlamaForTokenClassification"]}, dense=HEAD)
    assert {key: made[key] for key in own} == own and made["architectures"] == ["LlamaForTokenClassification"]


@pytest.mark.parametrize(
    "own",
    [
        {"id2label": 3, "label2id": "x", "problem_type": [], "pad_token_id": "1", "architectures": 7},
        {"id2label": ["a", "b", "c"], "architectures": [{}, "not a Classification"]},
    ],
)
def test_what_makes_no_sense_is_left_out(tmp_path: Path, own: dict[str, Any]) -> None:
    made = exported(tmp_path, own, dense=HEAD)
    assert made["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)} and "problem_type" not in made
    assert made["pad_token_id"] == 0 and made["architectures"] == ["LlamaForSequenceClassification"]


def test_labels_that_go_without_saying_are_not_the_bases(tmp_path: Path) -> None:
    """Transformers leaves out LABEL_0, LABEL_1; the base may be a classifier of two other classes."""
    base = {"id2label": {"0": "spam", "1": "ham"}, "label2id": {"spam": 0, "ham": 1}, "problem_type": "regression"}
    two = {"score.weight": torch.ones(2, pico.HIDDEN)}
    assert "spam" not in str(exported(tmp_path, {}, base, two)) and exported(tmp_path, {}, base)["id2label"] == base["id2label"]


LOCAL = {"AutoConfig": "configuration_pico.PicoConfig", "AutoTokenizer": ["tokenization_pico.PicoTokenizer", None]}
FOREIGN = {"AutoModelForCausalLM": "alice/pico--modeling_pico.Pico", "AutoTokenizer": [None, "alice/pico--tokens.Fast"]}


def test_code_beside_the_base_is_not_copied_and_not_named(tmp_path: Path) -> None:
    said: list[str] = []
    assert "auto_map" not in exported(tmp_path, {}, {"auto_map": LOCAL})
    pipelines = {"p": {"impl": "pipeline.P"}, "q": {"impl": "alice/pico--pipeline.Q"}}
    made = exported(tmp_path, {}, {"auto_map": {"AutoConfig": LOCAL["AutoConfig"]} | FOREIGN, "custom_pipelines": pipelines})
    assert made["auto_map"] == FOREIGN
    assert made["custom_pipelines"] == {"q": pipelines["q"]}
    tokenizer = {"auto_map": LOCAL, "tokenizer_class": "PicoTokenizer"}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "base/vocab.txt").write_text("a\n")
    export(tmp_path / "adapter", tmp_path / "out", force=True, say=said.append)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"tokenizer_class": "PicoTokenizer"}
    assert len(said) == 1 and "(AutoConfig, p, AutoTokenizer)" in said[0]
