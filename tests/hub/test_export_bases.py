"""Which base an adapter's name of it is: a folder that is here, a model of the Hub with or without an owner; and how others see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, PreTrainedModel

import pico
from hub.exported import adapter_for, logits
from hub.loopback import LoopbackHub
from speft_core import SparseAdapter, UserError
from speft_hub import pull, push
from speft_hub.addresses import parse, public_base
from speft_hub.export import export


def metadata(folder: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    return found


def same(folder: Path, model: PreTrainedModel, adapter: SparseAdapter) -> None:
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))


def test_a_relative_path_is_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """models/llama is written as alice/llama is; what is here is a path."""
    monkeypatch.chdir(tmp_path)
    model = pico.llama()
    model.save_pretrained("models/llama")
    adapter = adapter_for(model, "models/llama")
    adapter.save("adapter")
    push("adapter", f"file://{tmp_path}/registry/me/a")
    pulled = pull(f"file://{tmp_path}/registry/me/a", "copy").path
    assert json.loads((pulled / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama"
    assert "models/llama" not in (pulled / "README.md").read_text() and "base_model" not in metadata(pulled)
    export("adapter", "out")
    assert "models/llama" not in (tmp_path / "out/README.md").read_text() and "base_model" not in metadata(tmp_path / "out")
    same(tmp_path / "out", model, adapter)


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/llama").mkdir(parents=True)
    names = {"alice/llama": "alice/llama", "gpt2": "gpt2", "here/llama": "llama", "here/llama/": "llama", "bundled:x": "bundled:x"}
    assert {name: public_base(name) for name in names} == names
    assert public_base("a/" + "x" * 5000) and public_base("a\0b/c") == "a\0b/c"  # what no path can be is none


@pytest.mark.parametrize("pinned", [False, True])
def test_a_base_of_the_hub_without_an_owner(tmp_path: Path, hub: LoopbackHub, pinned: bool) -> None:
    """gpt2, as training takes it; the Hub leads on to the repository that it is by now."""
    model = pico.gpt2()
    model.save_pretrained(tmp_path / "base")
    api = HfApi(endpoint=hub.url)
    api.create_repo("alice/gpt2")
    sha = api.upload_folder(repo_id="alice/gpt2", folder_path=tmp_path / "base").oid
    hub.moved["gpt2"] = "alice/gpt2"
    adapter = adapter_for(model, "gpt2", base_model_revision=sha if pinned else None)
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    same(tmp_path / "out", model, adapter)
    assert metadata(tmp_path / "out")["base_model"] == "gpt2"
    export(tmp_path / "adapter", tmp_path / "again", "gpt2@main")
    assert metadata(tmp_path / "again")["base_model"] == "gpt2"


def test_what_is_no_base(tmp_path: Path, hub: LoopbackHub) -> None:
    adapter_for(pico.llama(), "no-such-model").save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"base model: no-such-model@main not found.*--base FOLDER"):
        export(tmp_path / "adapter", tmp_path / "out")
    for base in ("/no/such/folder", "models/../llama", "a/b/c", "ghost model"):
        with pytest.raises(UserError, match=r"a base is a folder, bundled:NAME, name, owner/name or file:///path/owner/name, got"):
            export(tmp_path / "adapter", tmp_path / "out", base)
    with pytest.raises(UserError, match="a repository is written owner/name"):
        parse("gpt2")  # what is published has an owner
