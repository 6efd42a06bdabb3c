"""The head of a checkpoint that is a classifier already: kept where it fits, begun anew where it does not or the config says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import pico
import pico_tokenizers
from speft_train import heads, models
from speft_train.config import RunConfig, from_mapping
from speft_train.data.labels import LabelSpace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama that tells two classes apart."""
    folder, tokenizer = tmp_path_factory.mktemp("classifier"), pico_tokenizers.byte_level()
    config = pico.llama(vocab_size=len(tokenizer)).config
    config.num_labels = 2
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, names: tuple[str, ...] = ("bad", "good"), **head: Any) -> tuple[Any, RunConfig]:
    model = {"name": str(folder), "dtype": "float32", "task": "sequence_classification", "head": head}
    cfg = from_mapping({"output_dir": "o", "model": model, "adapter": {"budget": {"k": 1}}, "data": {"train": "t"}})
    return models.load_model(cfg, LabelSpace(names))[0], cfg


def test_the_head_of_a_decoder_that_is_a_classifier_is_kept(checkpoint: Path) -> None:
    saved = LlamaForSequenceClassification.from_pretrained(checkpoint).score.weight
    model, cfg = loaded(checkpoint)
    assert torch.equal(model.score.weight, saved) and saved.abs().min() > 0
    assert "from the checkpoint, trained whole" in heads.about(model, cfg)


@pytest.mark.parametrize(
    ("names", "head"),
    [(("a", "b", "c"), {}), (("bad", "good"), {"init_std": 0.5}), (("bad", "good"), {"words": {"bad": "a", "good": "b"}})],
)
def test_a_head_for_other_classes_or_with_a_start_of_its_own_begins_anew(
    checkpoint: Path, names: tuple[str, ...], head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.full((2, pico.HIDDEN), 0.25)
    monkeypatch.setattr(heads, "_word_rows", lambda *args: rows)  # a classifier's checkpoint has no vocabulary head
    saved = LlamaForSequenceClassification.from_pretrained(checkpoint).score.weight
    model, cfg = loaded(checkpoint, names, **head)
    assert model.score.weight.shape == (len(names), pico.HIDDEN)
    assert not torch.equal(model.score.weight[:2], saved)
    assert "from the checkpoint" not in heads.about(model, cfg)
    if "init_std" in head:
        assert model.score.weight.std().item() == pytest.approx(0.5, rel=0.3)
    if "words" in head:
        assert torch.equal(model.score.weight, rows)
