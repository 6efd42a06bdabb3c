"""A pico model and its tokenizer as a folder, and configs of runs on it that take seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml

import pico
import pico_tokenizers
import speft_core as sc

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


def random_masks_digest(backwards: bool = False) -> str:
    """Hash of random masks of a pico model, exact and by coins, drawn here; its modules in their order or backwards."""
    found = hashlib.sha256()
    model = pico.llama()
    if backwards:
        for module in model.modules():
            module._modules = dict(reversed(module._modules.items()))
    for mode in ("exact", "bernoulli"):
        mask = sc.find_mask(model, metric="random", budget=sc.Budget(k=500), seed=7, random_mode=mode)
        assert mask.names[0].startswith("model.layers.1" if backwards else "model.layers.0")
        for name in sorted(mask.indices):
            found.update(name.encode() + mask.indices[name].numpy().tobytes())
    return found.hexdigest()
