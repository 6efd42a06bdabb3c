"""Examples and prompts that are longer than a model has positions for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import pico_run
import pico_tokenizers
from speft_core.errors import UserError
from speft_train import cli, models, positions, results
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


def causal(folder: Path, kind: str) -> Path:
    """A model of 64 positions and no weights: what is told of it is told before these are loaded."""
    import transformers

    tokenizer = pico_tokenizers.byte_level()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    special: dict[str, Any] = {"gptj": {"rotary_dim": 4}, "gpt_neo": {"attention_types": [[["global"], 1]]}}
    special["roberta"] = {"is_decoder": True, "intermediate_size": 24}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ends, max_position_embeddings=64, **special.get(kind, {}))
    config.architectures = ["RobertaForCausalLM"] if kind == "roberta" else None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asks(folder: Path, kind: str, example: int, prompt: int, new: int, **sections: Any) -> str:
    """What a run ends with whose longest training example and longest prompt have so many tokens."""
    around = len("Question: \nAnswer: 1</s>") - 3
    frame = len("Question: \nAnswer:")
    rows = [{"question": "q" * (example - around), "answer": "1"}] * 8
    asked = [{"question": "q" * (prompt - frame), "answer": "1"}]
    for name, written in (("train", rows), ("test", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    data = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "max_length": 100}
    settings = {"max_new_tokens": new, "base": False, **sections.pop("evaluate", {})}
    config = pico_run.make_config(
        folder / "c.yaml", causal(folder / kind, kind), folder / "run", data=data | sections.pop("data", {}), evaluate=settings
    )
    with pytest.raises(UserError) as told:
        cli.execute(config, [], dry_run=False)
    assert not (folder / "run/stages.json").exists()
    return str(told.value)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo", "gptj", "roberta"])
def test_a_table_of_positions_ends_a_language_model_before_it_is_loaded(kind: str, tmp_path: Path) -> None:
    room = 63 if kind == "roberta" else 64
    fits = "cannot be loaded"  # the next that is wrong: there are no weights
    assert fits in asks(tmp_path, kind, room, 40, room - 39)
    long = f"data.max_length must be at most the model's {room} positions; an example has {room + 1} tokens"
    assert asks(tmp_path, kind, room + 1, 40, 9) == long
    told = asks(tmp_path, kind, 40, 50, 256)
    assert told == (
        f"evaluate.max_new_tokens must leave room for the prompt in the model's {room} positions; got 256, and the longest prompt"
        f" has 50 tokens: lower it to {room - 49}, or set evaluate.generation=false"
    )
    assert "has 70 tokens: set evaluate.generation=false" in asks(tmp_path, kind, 40, 70, 1)
    assert fits in asks(tmp_path, kind, 40, 50, 256, evaluate={"generation": False})


def test_the_last_token_that_fits_is_generated_and_the_next_one_has_no_position() -> None:
    model = pico.gpt2()  # of 64 positions
    prompt = torch.full((1, 50), 5)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(prompt, max_new_tokens=15, **options).shape == (1, 65)
    with pytest.raises(IndexError):
        model.generate(prompt, max_new_tokens=16, **options)


def test_rotary_positions_have_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing is tokenized for them, and the second run of a sweep makes no model to see it."""
    monkeypatch.setattr(positions, "_longest", None)
    monkeypatch.setattr(positions, "_ENDS", {})
    assert "cannot be loaded" in asks(tmp_path, "llama", 90, 70, 256)
    monkeypatch.setattr(models, "meta_model", None)
    assert "cannot be loaded" in asks(tmp_path, "llama", 90, 70, 256)


def test_choices_need_positions_too(tmp_path: Path) -> None:
    """The right one is short, and a wrong one is not."""
    rows = [{"question": "q", "choices": ["a", "b" * 90], "answer": 0}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl"), "template": "multiple_choice"}
    assert "the model's 64 positions; an example has 99 tokens" in asks(
        tmp_path, "gpt2", 40, 40, 2, data={**data, "max_length": 99}
    )
