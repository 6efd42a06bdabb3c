"""Architectures of models named in configs/, as published: enough to plan a run (names, shapes, counts) without a
network.
"""

from __future__ import annotations

from typing import Any

# Hub id -> arguments of the model's configuration class, from the config.json of the repository.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
}
