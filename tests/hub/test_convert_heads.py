"""Checkpoints that have tensors which their base has not: heads become part of the adapter, the rest is refused, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForTokenClassification

import pico
import speft_core as sc
from speft_core import SparseAdapter, UserError
from speft_hub.cli import app
from speft_hub.console import run
from speft_hub.diff import adapter_between, diff_checkpoints
from speft_hub.export import export

LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in pico.batch(model).items() if k != "labels"}).logits


def finetuned(base: Path, out: Path, **fields: Any) -> Any:
    """A classifier of the base: some weights of its body changed, and a head of its own."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **LABELS, **fields).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :5] += 1
        model.score.weight.normal_()
    model.save_pretrained(out)
    return model


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add tensors to a checkpoint (`__` in a name is a dot), or take them out."""
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_head_of_a_classifier_comes_along_and_goes_out_again(tmp_path: Path, top_k: int | None) -> None:
    pico.llama(tied=True).save_pretrained(tmp_path / "base")
    tuned = finetuned(tmp_path / "base", tmp_path / "tuned", problem_type="single_label_classification")
    words = ["convert", tmp_path / "tuned", tmp_path / "adapter", "--against", tmp_path / "base"]
    assert run(app, [*map(str, words), *(["--top-k", str(top_k)] if top_k else [])]) == 0
    adapter = SparseAdapter.load(tmp_path / "adapter")
    assert adapter.nnz == (top_k or 5) and adapter.config.task_type == "SEQ_CLS"
    assert torch.equal(adapter.dense["score.weight"], tuned.score.weight)
    assert str(tmp_path) not in (tmp_path / "adapter/config.json").read_text()
    export(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again.score.weight, tuned.score.weight)
    assert again.config.id2label == LABELS["id2label"] and again.config.problem_type == "single_label_classification"
    assert torch.equal(logits(again), logits(tuned)) == (top_k is None)


def test_a_head_for_every_token_is_told_from_one_for_the_text(tmp_path: Path) -> None:
    pico.llama(tied=True).save_pretrained(tmp_path / "base")
    LlamaForTokenClassification.from_pretrained(tmp_path / "base", num_labels=3).save_pretrained(tmp_path / "tuned")
    made = adapter_between(tmp_path / "base", tmp_path / "tuned")
    assert made.config.task_type == "TOKEN_CLS" and "score.weight" in made.dense


def test_what_an_adapter_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = pico.llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    for i, (name, message) in enumerate(
        (
            ("lm_head.weight", "lm_head.weight is in .* alone.*ties"),
            ("model.layers.2.mlp.up_proj.weight", r"model\.layers\.2\.mlp\.up_proj\.weight is in .* alone"),
            ("qa_outputs.weight", "qa_outputs.weight is in .* alone"),
        )
    ):
        folder = tmp_path / f"tuned{i}"
        base.save_pretrained(folder)
        change(folder, **{name.replace(".", "__"): torch.randn(pico.VOCAB, pico.HIDDEN)})
        with pytest.raises(UserError, match=message):
            adapter_between(tmp_path / "base", folder)
        assert run(app, ["convert", str(folder), str(tmp_path / "out"), "--against", str(tmp_path / "base")]) == 2
        assert not (tmp_path / "out").exists()
    finetuned(tmp_path / "base", tmp_path / "nan")
    change(tmp_path / "nan", score__weight=torch.full((3, pico.HIDDEN), torch.nan))
    with pytest.raises(UserError, match=r"score\.weight holds NaN"):
        adapter_between(tmp_path / "base", tmp_path / "nan")


@pytest.mark.parametrize(("base_has_both", "silent"), [(False, False), (True, False), (True, True)])
def test_a_tied_head_that_is_stored_is_the_embeddings_and_an_untied_one_is_refused(
    tmp_path: Path, base_has_both: bool, silent: bool
) -> None:
    base, tuned = pico.llama(tied=True), pico.llama(tied=True)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[3, :4] += 1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    if base_has_both:
        change(tmp_path / "base", lm_head__weight=base.model.embed_tokens.weight.detach().clone())
    if silent:  # as GPT-2's, whose class ties them by default
        config = json.loads((tmp_path / "base/config.json").read_text())
        del config["tie_word_embeddings"]
        (tmp_path / "base/config.json").write_text(json.dumps(config))
    change(tmp_path / "tuned", lm_head__weight=tuned.model.embed_tokens.weight.detach().clone())
    adapter_between(tmp_path / "base", tmp_path / "tuned").save(tmp_path / "adapter")
    assert list(SparseAdapter.load(tmp_path / "adapter").deltas) == ["model.embed_tokens.weight"]
    export(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[n], load_file(tmp_path / "tuned/model.safetensors")[n]) for n in written)
    change(tmp_path / "tuned", lm_head__weight=torch.randn(pico.VOCAB, pico.HIDDEN))
    with pytest.raises(UserError, match=r"lm_head\.weight.*ties"):
        adapter_between(tmp_path / "base", tmp_path / "tuned")


def test_diff_lists_what_only_one_of_them_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico.llama(tied=True).save_pretrained(tmp_path / "base")
    tuned = finetuned(tmp_path / "base", tmp_path / "tuned")
    for a, b, side in (("base", "tuned", "b"), ("tuned", "base", "a")):
        rows = {r.name: r for r in diff_checkpoints(tmp_path / a, tmp_path / b)}
        assert rows["score.weight"].only == side and rows["score.weight"].changed == 3 * pico.HIDDEN
        assert rows["score.weight"].norm == pytest.approx(float(tuned.score.weight.detach().double().norm()))
        assert [n for n, r in rows.items() if r.only] == ["score.weight"]
        assert run(app, ["diff", str(tmp_path / a), str(tmp_path / b), "--json"]) == 0
        (told,) = [r for r in json.loads(capsys.readouterr().out) if "only" in r]
        assert told["name"] == "score.weight" and told["only"] == side
        assert run(app, ["diff", str(tmp_path / a), str(tmp_path / b)]) == 0
        assert f"{side} alone" in capsys.readouterr().out


def test_a_head_of_its_own_is_one_whatever_the_configuration_says(tmp_path: Path) -> None:
    """As Transformers has it: two stored tensors that differ are not tied."""
    base = pico.llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    change(tmp_path / "base", lm_head__weight=torch.randn(pico.VOCAB, pico.HIDDEN))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=3), targets=["lm_head"])
    tuner = sc.attach(model, mask)
    for values in tuner.values.values():
        values.data.fill_(0.5)
    tuner.adapter().save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    changed = {n: int((before[n] != after[n]).sum()) for n in before}
    assert changed.pop("lm_head.weight") == 3 and not any(changed.values())
