"""A classifier and the base that it really was trained from: other prefixes, output layers of other tasks, stored tied pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import pico
from speft_core import SparseAdapter, UserError
from speft_hub.cli import app
from speft_hub.console import run
from speft_hub.describe import check_against
from speft_hub.diff import adapter_between
from speft_hub.export import export

SMALL: dict[str, Any] = dict(vocab_size=64, num_labels=3, pad_token_id=0, initializer_range=0.2)
WIDTH: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SMALL, **WIDTH, **NO_DROPOUT, max_position_embeddings=64)).eval()


def distilbert() -> PreTrainedModel:
    return DistilBertForMaskedLM(DistilBertConfig(**SMALL, dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0)).eval()


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "untied llama": lambda: pico.llama(tied=False),
    "llama without its head": lambda: LlamaModel(pico.llama().config).eval(),
    "bert, masked language model": lambda: BertForMaskedLM(pico.bert().config).eval(),
    "bert, encoder alone": lambda: BertModel(pico.bert().config).eval(),
    "bert, encoder without a pooler": lambda: BertModel(pico.bert().config, add_pooling_layer=False).eval(),
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2, body alone": lambda: GPT2Model(pico.gpt2().config).eval(),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def disturb(model: PreTrainedModel) -> None:
    """Change a few entries of every weight, and all of the head."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "score" in name or "classifier" in name or "pooler" in name:
                weight.normal_(generator=draw)
            else:
                weight.view(-1)[:7] += torch.randn(min(7, weight.numel()), generator=draw)


def pair(root: Path, kind: str) -> PreTrainedModel:
    """A base in `base` and a classifier of it in `tuned`."""
    torch.manual_seed(0)
    BASES[kind]().save_pretrained(root / "base")
    tuned = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3).eval()
    disturb(tuned)
    tuned.save_pretrained(root / "tuned")
    return tuned


@pytest.mark.parametrize("kind", list(BASES))
def test_a_classifier_of_its_base_and_back(tmp_path: Path, kind: str) -> None:
    tuned = pair(tmp_path, kind)
    words = ["convert", tmp_path / "tuned", tmp_path / "adapter", "--against", tmp_path / "base"]
    assert run(app, [str(w) for w in words]) == 0
    adapter = SparseAdapter.load(tmp_path / "adapter")
    assert adapter.config.task_type == "SEQ_CLS" and adapter.nnz > 0 and adapter.dense
    own = dict(tuned.named_parameters())
    assert {*adapter.deltas, *adapter.dense} <= set(own)
    assert check_against(adapter, tmp_path / "base") == len(adapter.deltas)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    with adapter.applied(model):
        assert all(torch.equal(weight, own[name]) for name, weight in model.named_parameters())
    export(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert all(torch.equal(weight, own[name]) for name, weight in again.named_parameters())
    assert torch.equal(logits(again), logits(tuned)) and not torch.equal(logits(again), logits(model))


def test_a_pooler_that_the_class_drops(tmp_path: Path) -> None:
    BertModel(pico.bert().config).save_pretrained(tmp_path / "base")
    tuned = BertForTokenClassification.from_pretrained(tmp_path / "base").eval()
    disturb(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    adapter = adapter_between(tmp_path / "base", tmp_path / "tuned")
    assert adapter.config.task_type == "TOKEN_CLS" and not any("pooler" in n for n in (*adapter.deltas, *adapter.dense))
    model = BertForTokenClassification.from_pretrained(tmp_path / "base").eval()
    with adapter.applied(model):
        assert torch.equal(logits(model), logits(tuned))


@pytest.mark.parametrize("head", [True, False])
def test_a_base_that_stores_both_of_a_tied_pair(tmp_path: Path, head: bool) -> None:
    """As older versions of Transformers did; today's store the embeddings alone."""
    pico.llama(tied=True).save_pretrained(tmp_path / "base")
    kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    tuned = kind.from_pretrained(tmp_path / "base", **({"num_labels": 3} if head else {})).eval()
    disturb(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    stored = load_file(tmp_path / "base/model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter_between(tmp_path / "base", tmp_path / "tuned").save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "out").eval()), logits(tuned))


def test_buffers_of_older_versions_are_no_difference(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has its causal masks in it, RoBERTa's the numbers of its positions."""
    tuned = pair(tmp_path, "gpt2, body alone")
    stored = load_file(tmp_path / "base/model.safetensors")
    extra = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4), "position_ids": torch.arange(64)}
    save_file(stored | extra, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter = adapter_between(tmp_path / "base", tmp_path / "tuned")
    assert set(adapter.deltas) | set(adapter.dense) <= {name for name, _ in tuned.named_parameters()}
    with_ids = load_file(tmp_path / "tuned/model.safetensors") | {"position_ids": torch.arange(64)}
    save_file(with_ids, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    assert adapter_between(tmp_path / "base", tmp_path / "tuned").nnz == adapter.nnz
    with_ids["position_ids"] = torch.arange(64).flip(0)
    save_file(with_ids, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^position_ids, of torch.int64 .*, differs; an adapter changes floating point"):
        adapter_between(tmp_path / "base", tmp_path / "tuned")


def test_what_the_tuned_one_cannot_do_without_is_refused(tmp_path: Path) -> None:
    base = pico.llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    shorter = LlamaForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=1)
    shorter.save_pretrained(tmp_path / "shorter")
    base.model.save_pretrained(tmp_path / "headless")
    pico.opt().save_pretrained(tmp_path / "opt")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, num_hidden_layers=1)
    tuned.save_pretrained(tmp_path / "classifier")
    for folder, message in (
        ("shorter", r"model\.layers\.1\.\S+ is in .*base and not in .*shorter; an adapter cannot take layers away"),
        ("classifier", r"model\.layers\.1\.\S+ is in .*base and not in .*classifier; an adapter cannot take layers away"),
        ("headless", r"lm_head\.weight is in .*base and not in .*headless, which has no head in its place"),
        ("opt", "as are all others; they are not of one architecture"),
    ):
        with pytest.raises(UserError, match=message):
            adapter_between(tmp_path / "base", tmp_path / folder)


def test_the_head_of_a_causal_model_is_compared_where_both_have_it(tmp_path: Path) -> None:
    """Untied, with another prefix on the body alone."""
    base = pico.llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    disturb(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(stored, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter = adapter_between(tmp_path / "base", tmp_path / "tuned")
    assert "lm_head.weight" in adapter.deltas and "model.layers.0.mlp.up_proj.weight" in adapter.deltas
    with adapter.applied(base):
        assert torch.equal(logits(base), logits(tuned))
    assert json.loads((tmp_path / "tuned/config.json").read_text())["tie_word_embeddings"] is False
