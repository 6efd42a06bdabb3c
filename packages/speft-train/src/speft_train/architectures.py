"""Architectures of models named in configs/, as published: enough to plan a run (names, shapes, counts) without a
network.
"""

from __future__ import annotations

from typing import Any

_GEMMA_2B = {
    "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
_MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


def _opt(hidden: int, ffn: int, layers: int, heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": hidden, "ffn_dim": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "word_embed_proj_dim": hidden, "max_position_embeddings": 2048,
        "architectures": ["OPTForCausalLM"], "pad_token_id": 1, **fields,
    }  # fmt: skip


def _bert(kind: str, vocabulary: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2, **fields,
    }  # fmt: skip


# Hub id -> arguments of the model's configuration class, from the config.json of the repository.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
    },
    "facebook/opt-125m": _opt(768, 3072, 12, 12),
    # Layer norms after the blocks, and embeddings of half the width.
    "facebook/opt-350m": _opt(1024, 4096, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 8192, 24, 32),
    "google-bert/bert-base-uncased": _bert("bert", 30522),
    "FacebookAI/roberta-base": _bert("roberta", 50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1),
    "google/gemma-2-2b": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "pad_token_id": 0,
    },
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2b-it": _GEMMA_2B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_7B,
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
