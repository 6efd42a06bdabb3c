"""The files of every tokenizer that Transformers has come along; where none is known, the export says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

import pico
import pico_tokenizers
from hub.exported import adapter_for
from hub.loopback import LoopbackHub
from speft_hub.export import export
from speft_hub.names import CHECKPOINT_FILES, VOCABULARY

MORE = ("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "tiktoken.model")  # of Mistral and Qwen, and slow copies


def vocabulary_files() -> set[str]:
    """What the tables VOCAB_FILES_NAMES of the installed Transformers name, read without importing eighty modules."""
    found: set[str] = set()
    for file in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                assert isinstance(node.value, ast.Dict), file
                found |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    return found


def test_every_vocabulary_file_of_transformers_is_known() -> None:
    found = vocabulary_files()
    assert len(found) > 20 and {"spm.model", "bpe.codes", "sentencepiece.bpe.model"} <= found
    assert not [name for name in sorted(found) if not CHECKPOINT_FILES.fullmatch(name)]
    assert not [name for name in sorted(found - {"tokenizer_config.json"}) if not VOCABULARY.fullmatch(name)]
    assert all(VOCABULARY.fullmatch(name) for name in MORE)
    templates = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/tool_use.jinja")
    assert all(CHECKPOINT_FILES.fullmatch(name) for name in templates)
    for name in ("model.bin", "modeling.py", "x/vocab.txt", f"{CHAT_TEMPLATE_DIR}/../x.jinja", f"{CHAT_TEMPLATE_DIR}/.jinja", "model"):
        assert not CHECKPOINT_FILES.fullmatch(name)


def prepare(root: Path, base: str | None = None) -> None:
    model = pico.llama()
    model.save_pretrained(root / "base")
    tokenizer = pico_tokenizers.byte_level()
    tokenizer.chat_template = {"default": pico_tokenizers.CHAT, "tool_use": "tools: " + pico_tokenizers.CHAT}
    tokenizer.save_pretrained(root / "base")
    assert (root / f"base/{CHAT_TEMPLATE_DIR}/tool_use.jinja").is_file()
    (root / f"base/{CHAT_TEMPLATE_DIR}/run.py").write_text("evil")
    adapter_for(model, base or str(root / "base")).save(root / "adapter")


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_tokenizer_with_more_than_one_chat_template(tmp_path: Path, hub: LoopbackHub, on_hub: bool) -> None:
    from huggingface_hub import HfApi

    prepare(tmp_path, "alice/pico" if on_hub else None)
    if on_hub:
        api = HfApi(endpoint=hub.url)
        api.create_repo("alice/pico")
        api.upload_folder(repo_id="alice/pico", folder_path=tmp_path / "base")
    said: list[str] = []
    export(tmp_path / "adapter", tmp_path / "out", say=said.append)
    export(tmp_path / "adapter", tmp_path / "out", force=True)  # the folder of templates is an export's own
    there, here = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert here.chat_template == there.chat_template and set(here.chat_template) == {"default", "tool_use"}
    assert here("some text")["input_ids"] == there("some text")["input_ids"]
    assert not said and not (tmp_path / f"out/{CHAT_TEMPLATE_DIR}/run.py").exists()


def test_a_tokenizer_without_a_vocabulary_that_is_known(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "base/tokenizer.json").rename(tmp_path / "base/tokenizer.bin")
    said: list[str] = []
    export(tmp_path / "adapter", tmp_path / "out", say=said.append)
    assert len(said) == 1 and "tokenizer_config.json and no vocabulary file" in said[0]
    (tmp_path / "base/tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')  # it needs none
    export(tmp_path / "adapter", tmp_path / "out", force=True, say=said.append)
    assert len(said) == 1
