"""Where a base calls a tensor otherwise than the model: what was trained is in the export that Transformers loads, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import pico
from hub.exported import adapter_for, logits
from speft_core import AdapterConfig, MultiHeadModel, SparseAdapter, UserError
from speft_hub.checkpoint import Checkpoint
from speft_hub.describe import check_against
from speft_hub.export import export


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def export_dense(root: Path, dense: dict[str, torch.Tensor]) -> Path:
    SparseAdapter({}, dense, AdapterConfig(base_model_name_or_path=str(root / "base")), {}).save(root / "adapter")
    return export(root / "adapter", root / "out")


@pytest.mark.parametrize("whole", [False, True])
def test_bert_with_the_old_names_of_its_norms(tmp_path: Path, whole: bool) -> None:
    """As bert-base-uncased is stored: LayerNorm.gamma and LayerNorm.beta. Sparse changes, or every bias trained whole (BitFit)."""
    pico.bert().save_pretrained(tmp_path / "base")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in stored(tmp_path / "base").items()
    }
    assert sum(".LayerNorm.beta" in k for k in old) == 5
    save_file(old, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    biases = {n: p.detach() + torch.randn_like(p) for n, p in model.named_parameters() if n.endswith("bias")}
    adapter = adapter_for(model, str(tmp_path / "base"), dense=biases if whole else None, skip="bias" if whole else "")
    adapter.save(tmp_path / "adapter")
    assert check_against(adapter, tmp_path / "base") == len(adapter.deltas)
    export(tmp_path / "adapter", tmp_path / "out")
    assert set(stored(tmp_path / "out")) == set(old) and not (tmp_path / "out/model-heads.safetensors").exists()
    before = logits(model)
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), logits(model))
        assert not torch.equal(logits(model), before)


def test_the_output_layer_of_gpt_neox(tmp_path: Path) -> None:
    """Stored as embed_out (as Pythia is), called lm_head by the model."""
    config = GPTNeoXConfig(
        vocab_size=pico.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in stored(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    dense = {"lm_head.weight": torch.randn(pico.VOCAB, 16)}
    adapter = SparseAdapter({}, dense, AdapterConfig(base_model_name_or_path=str(tmp_path / "base")), {})
    export_dense(tmp_path, dense)
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_a_router_that_is_renamed_on_load_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=pico.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    router = next(n for n, _ in model.named_parameters() if n.endswith("gate.weight"))
    assert router not in Checkpoint(tmp_path / "base").places
    with pytest.raises(UserError, match=f"no tensor for the adapter's {router}"):
        export_dense(tmp_path, {router: torch.randn(2, 16)})
    assert not (tmp_path / "out").exists()


def shapes(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn((4, 16) if name.endswith("weight") else (4,)) for name in names}


@pytest.mark.parametrize(
    "dense",
    [
        shapes("score.weight"),
        shapes("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"),
        shapes("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"),
        shapes("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"),
        shapes("classification_head.out_proj.weight", "classification_head.out_proj.bias"),
        shapes("head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"),
        shapes("qa_outputs.weight", "qa_outputs.bias"),
    ],
)
def test_a_head_that_the_base_has_not_goes_along(tmp_path: Path, dense: dict[str, torch.Tensor]) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    export_dense(tmp_path, dense)
    assert set(load_file(tmp_path / "out/model-heads.safetensors")) == set(dense)


@pytest.mark.parametrize(
    "dense, name",
    [
        (shapes("model.layers.0.self_attn.q_proj.bias"), "model.layers.0.self_attn.q_proj.bias"),
        (shapes("v_head.weight"), "v_head.weight"),
        (shapes("model.score.weight"), "model.score.weight"),
        (shapes("scores.weight"), "scores.weight"),
        (shapes("bert.pooler.dense.bias", "classifier.weight"), "bert.pooler.dense.bias"),  # its weight would be a random one
    ],
)
def test_what_is_no_head_is_refused(tmp_path: Path, dense: dict[str, torch.Tensor], name: str) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=f"no tensor for the adapter's {name}"):
        export_dense(tmp_path, dense)
    assert not (tmp_path / "out").exists()


def test_a_pooler_that_a_masked_model_has_not(tmp_path: Path) -> None:
    config: Any = pico.bert().config
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    assert not any("pooler" in name for name in stored(tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    dense = {n: torch.randn_like(p) for n, p in model.named_parameters() if "pooler" in n or "classifier" in n}
    assert len(dense) == 4
    export_dense(tmp_path, dense)
    with SparseAdapter({}, dense, AdapterConfig(), {}).applied(model):
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_an_output_layer_of_its_own_does_not_change_tied_embeddings(tmp_path: Path) -> None:
    base = pico.llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_for(base, str(tmp_path / "base"), skip="embed")
    with MultiHeadModel(base, adapter, {"a": {"lm_head.weight": torch.randn(pico.VOCAB, 16)}}) as many:
        many.save(tmp_path / "many")
    with pytest.raises(UserError, match=r"lm_head\.weight is the embeddings once more"):
        export(tmp_path / "many", tmp_path / "out", head="a")
    assert not (tmp_path / "out").exists()
