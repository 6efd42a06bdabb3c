"""The models, token batches and masks that the benchmarks run on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import speft_core as sc

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUNDLED = "bundled:smollm2-135m"
WORD_PROBLEMS = "bundled:word-problems"


def load(name: str, dtype: str, width: int | None = None) -> Any:
    """A causal language model: `bundled:...`, a folder, `wide` (hidden 2048, 4 layers, random) or `tiny` (for tests)."""
    import transformers

    if name in ("wide", "tiny"):
        hidden = width or (2048 if name == "wide" else 64)
        heads = max(1, hidden // 64)
        config = transformers.LlamaConfig(
            vocab_size=8192 if name == "wide" else 128,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=4 if name == "wide" else 2,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype])
    else:
        folder = name
        if name.startswith("bundled:"):
            from speft_train import bundled

            folder = str(bundled.folder(name))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    return model.train()


def token_batches(name: str, data: str | None, rows: int, length: int, count: int) -> list[torch.Tensor]:
    """`count` batches of `rows` x `length` tokens: the texts of `data` (JSON Lines with question and answer) end to end, or random."""
    need = rows * length * count
    if name in ("wide", "tiny") or data is None:
        vocabulary = {"wide": 8192, "tiny": 128}.get(name, 49152)
        ids = torch.randint(3, vocabulary, (need,), generator=torch.Generator().manual_seed(0))
    else:
        import transformers

        folder = name
        if name.startswith("bundled:"):
            from speft_train import bundled

            folder = str(bundled.folder(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found: list[int] = []
        for question, answer in _questions(data):
            found += tokenizer(f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}")["input_ids"]
            if len(found) >= need:
                break
        ids = torch.tensor((found * (need // max(1, len(found)) + 1))[:need])
    return list(ids.view(count, rows, length))


def _questions(data: str) -> Iterator[tuple[str, str]]:
    """(question, answer) of the bundled word problems or of a JSON Lines file."""
    if data == WORD_PROBLEMS:
        from speft_train.data.word_problems import make_problems

        yield from ((p.question, p.answer) for p in make_problems("train", 2000))
        return
    with Path(data).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["question"], row["answer"]


def make_mask(spec: dict[str, Any], path: Path) -> Path:
    """The mask of `spec` (model, data, metric, like_lora_r or density), made once and kept at `path`."""
    if path.is_file():
        return path
    model = load(spec["model"], "fp32", spec.get("width"))
    batches = [{"input_ids": b, "labels": b} for b in token_batches(spec["model"], spec.get("data"), 4, 256, 4)]
    if spec.get("like_lora_r"):
        budget = sc.Budget(like_lora_r=spec["like_lora_r"])
    else:
        budget = sc.Budget(density=spec["density"], of="targets")
    sc.find_mask(model, batches, metric=spec["metric"], budget=budget, targets="all-linear").save(path)
    return path
