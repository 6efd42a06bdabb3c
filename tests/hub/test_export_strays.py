"""Weights that lie beside a base's own: what transformers does not load is neither fetched nor exported, and heads are always found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import pico
from hub.loopback import LoopbackHub
from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.fingerprint import fingerprint
from speft_hub.checkpoint import Checkpoint
from speft_hub.export import export

LAYER = "model.layers.0.self_attn.q_proj.weight"
HEAD = {"score.weight": torch.arange(3.0 * pico.HIDDEN).view(3, pico.HIDDEN) / 40}


def prepare(root: Path, strays: tuple[str, ...], sharded: bool, base: str | None = None) -> Any:
    """A base with stray weights beside its own and an adapter of it with a head; the classifier that they must give."""
    pico.llama().save_pretrained(root / "base", max_shard_size=6000 if sharded else "1GB")
    for name in strays:
        save_file({"layers.0.attention.wq.weight": torch.ones(16, 16)}, root / "base" / name)
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3).eval()
    weight, indices = dict(model.named_parameters())[LAYER], torch.tensor([1, 7, 200], dtype=torch.int32)
    adapter = SparseAdapter(
        {LAYER: SparseDelta(indices, torch.ones(3), (16, 16))},
        dict(HEAD),
        AdapterConfig(base_model_name_or_path=base or str(root / "base"), task_type="SEQ_CLS"),
        {LAYER: fingerprint(weight, indices)},
    )
    adapter.save(root / "adapter")
    adapter.apply(model)
    return model


def same(out: Path, model: Any) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(out).eval()
    inputs = {k: v for k, v in pico.batch(model).items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


STRAYS = [(), ("consolidated.safetensors",), ("model-body.safetensors", "model-heads.safetensors")]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("strays", STRAYS)
def test_a_head_is_found_beside_stray_weights(tmp_path: Path, strays: tuple[str, ...], sharded: bool) -> None:
    model = prepare(tmp_path, strays, sharded)
    export(tmp_path / "adapter", tmp_path / "out")
    same(tmp_path / "out", model)
    exported = Checkpoint(tmp_path / "out")
    assert {f.name for f in exported.files} == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert not any(name.startswith("layers.") for name in exported.places)


def test_an_index_that_names_the_single_file_too(tmp_path: Path) -> None:
    model = prepare(tmp_path, (), False)
    stored = load_file(tmp_path / "base/model.safetensors")
    norm = {"extra.weight": torch.ones(3)}
    save_file(norm, tmp_path / "base/more.safetensors")
    where = dict.fromkeys(stored, "model.safetensors") | dict.fromkeys(norm, "more.safetensors")
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    export(tmp_path / "adapter", tmp_path / "out")
    same(tmp_path / "out", model)


def test_a_second_head_goes_on_top_of_an_export(tmp_path: Path) -> None:
    """An export's own head file is not overwritten by the next export's."""
    prepare(tmp_path, (), False)
    export(tmp_path / "adapter", tmp_path / "first")
    SparseAdapter({}, {"classifier.weight": torch.ones(3, 16)}, AdapterConfig(), {}).save(tmp_path / "other")
    export(tmp_path / "other", tmp_path / "second", str(tmp_path / "first"))
    assert {"score.weight", "classifier.weight", LAYER} <= set(Checkpoint(tmp_path / "second").places)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_on_the_hub_brings_only_what_is_loaded(tmp_path: Path, hub: LoopbackHub, sharded: bool) -> None:
    from huggingface_hub import HfApi

    model = prepare(tmp_path, ("consolidated.safetensors",), sharded, "alice/pico")
    api = HfApi(endpoint=hub.url)
    api.create_repo("alice/pico")
    api.upload_folder(repo_id="alice/pico", folder_path=tmp_path / "base")
    fetched: set[str] = set()
    export(tmp_path / "adapter", tmp_path / "out", progress=lambda name, done, total: fetched.add(name))
    same(tmp_path / "out", model)
    assert any(name.endswith(".safetensors") for name in fetched)
    assert "consolidated.safetensors" not in fetched and not (tmp_path / "out/consolidated.safetensors").exists()


@pytest.mark.parametrize(
    "index, message",
    [
        ("[1]", "no readable index"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "gone.safetensors is listed in the index and missing"),
        ('{"weight_map": {"x": ["model.safetensors"]}}', "no readable index"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "listed in the index and missing"),
    ],
)
def test_an_index_on_the_hub_that_cannot_be_is_refused_before_any_weight_is_fetched(
    tmp_path: Path, hub: LoopbackHub, index: str, message: str
) -> None:
    from huggingface_hub import HfApi

    prepare(tmp_path, (), False, "alice/pico")
    (tmp_path / "base/model.safetensors.index.json").write_text(index)
    api = HfApi(endpoint=hub.url)
    api.create_repo("alice/pico")
    api.upload_folder(repo_id="alice/pico", folder_path=tmp_path / "base")
    fetched: set[str] = set()
    for base in (None, str(tmp_path / "base")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "adapter", tmp_path / "out", base, progress=lambda name, done, total: fetched.add(name))
        assert not any(name.endswith(".safetensors") for name in fetched) and not (tmp_path / "out").exists()
