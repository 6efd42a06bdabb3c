"""The head of a checkpoint that is a classifier already: kept where it fits, begun anew where it does not or the config says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

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


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    ("own", "order"),
    [
        (["yes", "no", "maybe"], [2, 1, 0]),
        (["No", "MAYBE", "Yes"], [1, 0, 2]),
        (["maybe", "no", "yes"], None),
        (["LABEL_2", "LABEL_1", "LABEL_0"], None),
        (["yes", "no", "perhaps"], None),
    ],
    ids=["names", "case", "same", "generic", "others"],
)
def test_outputs_that_have_the_labels_names_stand_for_these_labels(
    kind: str, own: list[str], order: list[int] | None, tmp_path: Path
) -> None:
    """Of a decoder, and of an encoder, whose head has a bias: the logits go with their names."""
    tokenizer = pico_tokenizers.byte_level()
    config = getattr(pico, kind)(vocab_size=len(tokenizer)).config
    config.id2label, config.label2id = dict(enumerate(own)), {name: place for place, name in enumerate(own)}
    config.pad_token_id = tokenizer.pad_token_id
    saved = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in heads.modules(saved)["score" if kind == "llama" else "classifier"].parameters():
            parameter.normal_()
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, cfg = loaded(tmp_path, ("maybe", "no", "yes"))
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        before, after = saved(ids).logits, model(ids).logits
    torch.testing.assert_close(after, before[:, order] if order else before)
    assert ("its outputs put in the order of the labels" in heads.about(model, cfg)) == (order is not None)
    assert model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}


def test_a_head_that_begins_anew_is_not_said_to_be_put_in_order(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "named")
    config = LlamaForSequenceClassification.from_pretrained(folder).config
    config.id2label = {0: "good", 1: "bad"}
    config.save_pretrained(folder)
    assert "put in the order" in heads.about(*loaded(folder))
    assert "put in the order" not in heads.about(*loaded(folder, init_std=0.5))
