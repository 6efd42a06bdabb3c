"""Pico models made on the fly: real architectures with random weights, a few thousand scalars each, no downloads.

`pico.llama(tied=False)` and its like are plain functions, so a subprocess or a rank can make the very same model again;
`MODELS` is their table. The same arguments always give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

VOCAB = 64
HIDDEN = 16
LAYERS = 2
HEADS = 2
LABELS = 3


def _make(model_class: Callable[[Any], Any], config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype).eval()
        # Biases and norms start at 0 and 1; made random too, so that no test passes because a term vanished.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def llama(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Rotary positions, RMSNorm, grouped keys and values; no biases. `fields` go to LlamaConfig."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return _make(LlamaForCausalLM, LlamaConfig(**(settings | fields)), seed, dtype)


def opt(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Learned positions, LayerNorm, biases, ReLU. `fields` go to OPTConfig."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, tie_word_embeddings=tied, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, init_std=0.2,
    )  # fmt: skip
    return _make(OPTForCausalLM, OPTConfig(**(settings | fields)), seed, dtype)


def gpt2(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Conv1D layers, which keep their weights transposed, with q, k and v fused. `fields` go to GPT2Config."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return _make(GPT2LMHeadModel, GPT2Config(**(settings | fields)), seed, dtype)


def bert(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """An encoder with a classification head of LABELS classes, a dense head named `classifier`; it ties nothing."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, num_labels=LABELS, tie_word_embeddings=tied,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return _make(BertForSequenceClassification, BertConfig(**(settings | fields)), seed, dtype)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "opt": opt, "gpt2": gpt2, "bert": bert}


def batch(model: PreTrainedModel, *, rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids and the labels the model's own loss wants; the last row ends in two padded positions."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, -2:] = 0
    input_ids[attention_mask == 0] = 0
    if hasattr(model, "classifier"):
        labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    else:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
