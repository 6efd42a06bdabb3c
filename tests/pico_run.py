"""A pico model and its tokenizer as a folder, and configs of runs on it that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

import pico
import pico_tokenizers

# Not many characters, so that a pico model is still a pico model.
SIZES = {"hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": 256}


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Save a pico Llama with a tokenizer of one token a byte."""
    tokenizer = pico_tokenizers.byte_level()
    model = pico.llama(vocab_size=len(tokenizer), dtype=dtype, **{**SIZES, **fields})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(file: Path, base: Path, output: Path, /, **sections: Any) -> Path:
    """A YAML file of a run of 6 steps; `sections` are merged over it, section by section."""
    tree: dict[str, Any] = {
        "output_dir": str(output),
        "seed": 0,
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": "bundled:word-problems", "train_size": 40, "test_size": 4, "max_length": 256},
        "adapter": {"budget": {"density": 0.05, "of": "model"}, "calibration_examples": 8},
        "train": {"global_batch_size": 8, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 2},
        "evaluate": {"max_new_tokens": 2, "batch_size": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) and name in tree else section
    file.write_text(yaml.safe_dump(tree))
    return file
