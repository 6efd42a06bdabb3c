"""How long an example may be: as many tokens as the model has positions for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pico_tokenizers
from speft_core.errors import UserError
from speft_train import cli, results
from speft_train.folder import RunFolder


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_as_many_tokens_fit_as_the_model_has_positions_for(kind: str, tmp_path: Path) -> None:
    """RoBERTa's positions start after the padding's: of a table of 32, as many as the padding id says are never used."""
    import transformers

    tokenizer = pico_tokenizers.byte_level()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.AutoConfig.for_model(kind, **sizes, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id)
    transformers.AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    room = 32 if kind == "bert" else 32 - tokenizer.pad_token_id - 1
    rows = [{"text": "ab"[place % 2] * 60, "label": place % 2} for place in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(length: int) -> Any:
        data = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl"), "max_length": length, "overlong": "truncate"}
        train = {"global_batch_size": 8, "max_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none"}
        model = {"name": str(tmp_path / kind), "dtype": "float32", "task": "sequence_classification"}
        output = tmp_path / f"run{length}"
        config = {"output_dir": str(output), "model": model, "data": data, "train": train, "adapter": {"method": "head"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        cli.execute(tmp_path / "config.json", [], dry_run=False)
        return results.read(RunFolder(output))

    assert run(room)["adapted"]["count"] == 8
    with pytest.raises(UserError, match=f"at most the model's {room} positions; an example has {room + 1} tokens"):
        run(room + 1)
