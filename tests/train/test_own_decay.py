"""A head with a weight decay of its own, under every method that trains one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pico
import pico_tokenizers
from speft_train import cli, trainer


@pytest.mark.parametrize("method", ["sparse", "lora", "full", "head"])
def test_the_head_decays_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    tokenizer = pico_tokenizers.byte_level()
    pico.bert(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "xy"[place % 2] * (1 + place % 4), "label": place % 2} for place in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(tmp_path / "model"), "task": "sequence_classification", "head": {"weight_decay": 0.0}},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "adapter": {"method": method, "metric": "magnitude", "targets": ["query"], "budget": {"k": 100}},
        "train": {"global_batch_size": 4, "max_steps": 2, "weight_decay": 0.1, "save_strategy": "no"},
        "evaluate": {"enabled": False},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    decays: dict[str, float] = {}
    create = trainer.RunTrainer.create_optimizer

    def watched(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        decays.update({names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]})
        return optimizer

    monkeypatch.setattr(trainer.RunTrainer, "create_optimizer", watched)
    cli.execute(tmp_path / "a.yaml", [], dry_run=False)
    head = {name for name in decays if "classifier" in name}
    assert len(head) == 2 and all(decays[name] == 0.0 for name in head)
    rest = {name: decay for name, decay in decays.items() if name not in head}
    assert bool(rest) == (method != "head")
    # The Trainer itself spares biases and norms.
    assert all(decay == (0.0 if name.endswith(".bias") or "LayerNorm" in name else 0.1) for name, decay in rest.items())
