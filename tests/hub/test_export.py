"""An exported checkpoint loads in plain Transformers and gives the bits that the applied adapter gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

import pico
from hub.exported import adapter_for, logits
from hub.loopback import LoopbackHub
from speft_core import AdapterConfig, MultiHeadModel, SparseAdapter, SparseDelta, UserError
from speft_hub import push
from speft_hub.describe import check_against
from speft_hub.export import export


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_causal_models(tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype, sharded: bool) -> None:
    model = pico.MODELS[kind](tied=tied, dtype=dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=6000 if sharded else "1GB")
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == sharded
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=dtype
    ).eval()  # `.to(dtype)` rounds rotary buffers, too
    adapter = adapter_for(model, str(tmp_path / "base"))
    adapter.save(tmp_path / "adapter")
    assert check_against(adapter, tmp_path / "base") == len(adapter.deltas)
    export(tmp_path / "adapter", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with adapter.applied(model):
        expected = logits(model)
        assert torch.equal(logits(loaded), expected)
    assert not torch.equal(logits(model), expected)
    embeddings, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) == tied
    for base in (tmp_path / "base").glob("*.safetensors"):  # what the adapter does not change is the base's, byte for byte
        assert (tmp_path / "out" / base.name).stat().st_size == base.stat().st_size
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text() + (tmp_path / "out" / "config.json").read_text()


WITHOUT_SPEFT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("speft"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
saved = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    assert torch.equal(model(saved["ids"]).logits, saved["logits"])
assert not [name for name in sys.modules if name.startswith("speft")]
print("the same bits")
"""


def test_another_process_without_speft_gets_the_same_bits(tmp_path: Path) -> None:
    """The cheap half of a check made once in a fresh environment, with SmolLM2-135M and lm-eval (docs/hub.md)."""
    pico.llama(tied=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapter = adapter_for(model, str(tmp_path / "base"))
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    ids = pico.batch(model)["input_ids"]
    with adapter.applied(model), torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.safetensors")
    words = [sys.executable, "-c", WITHOUT_SPEFT, str(tmp_path / "out"), str(tmp_path / "expected.safetensors")]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "the same bits\n", run.stderr[-2000:]


def test_a_checkpoint_that_stores_both_of_a_tied_pair(tmp_path: Path) -> None:
    model = pico.llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter = adapter_for(model, str(tmp_path / "base"))
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with adapter.applied(model):
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_new_classification_head_on_a_causal_base(tmp_path: Path, sharded: bool) -> None:
    base = pico.llama(tied=True)
    base.save_pretrained(tmp_path / "base", max_shard_size=6000 if sharded else "1GB")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5).eval()
    head = {"score.weight": torch.randn(5, 16)}
    adapter = adapter_for(model, str(tmp_path / "base"), dense=head, skip="score", task_type="SEQ_CLS")
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert isinstance(loaded, LlamaForSequenceClassification) and loaded.config.num_labels == 5
    with adapter.applied(model):
        assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "adapter/config.json").write_text(model.config.to_json_string())  # as a training run writes it
    export(tmp_path / "adapter", tmp_path / "out", force=True)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), logits(loaded))


def test_an_encoder_and_a_head_that_the_base_has(tmp_path: Path) -> None:
    model = pico.bert()
    model.save_pretrained(tmp_path / "base")
    head = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    adapter = adapter_for(model, str(tmp_path / "base"), dense=head, skip="classifier")
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), logits(model))
    SparseAdapter(adapter.deltas, {"classifier.weight": torch.randn(4, 16)}, adapter.config).save(tmp_path / "adapter")
    with pytest.raises(UserError, match="without a head"):
        export(tmp_path / "adapter", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_one_head_of_a_multi_head_folder(tmp_path: Path) -> None:
    base = pico.llama()
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_for(base, str(tmp_path / "base"))
    heads = {"a": {"score.weight": torch.randn(2, 16)}, "b": {"score.weight": torch.randn(7, 16)}}
    with MultiHeadModel(base, adapter, heads) as many, torch.no_grad():
        many.save(tmp_path / "many")
        expected = many(**{k: v for k, v in pico.batch(base).items() if k != "labels"})["b"].logits
    export(tmp_path / "many", tmp_path / "out", head="b")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), expected)
    with pytest.raises(UserError, match="no head 'c'; it has a, b"):
        export(tmp_path / "many", tmp_path / "out2", head="c")
    with pytest.raises(UserError, match="choose with --head a or b"):
        export(tmp_path / "many", tmp_path / "out2")


def test_a_base_on_the_hub_is_fetched_at_its_commit(tmp_path: Path, hub: LoopbackHub) -> None:
    from huggingface_hub import HfApi

    model = pico.llama()
    model.save_pretrained(tmp_path / "base", max_shard_size=6000)
    (tmp_path / "base" / "modeling_evil.py").write_text("evil")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    api = HfApi(endpoint=hub.url)
    api.create_repo("alice/pico")
    sha = api.upload_folder(repo_id="alice/pico", folder_path=tmp_path / "base").oid
    adapter = adapter_for(model, "alice/pico", base_model_revision=sha)
    adapter.save(tmp_path / "adapter")
    push(tmp_path / "adapter", "alice/tuned")
    pico.llama(seed=9).save_pretrained(tmp_path / "other", max_shard_size=6000)
    api.upload_folder(repo_id="alice/pico", folder_path=tmp_path / "other")
    export(tmp_path / "adapter", tmp_path / "out")
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))
    assert not any(p.suffix in (".py", ".bin") for p in (tmp_path / "out").iterdir())
    assert "base_model: alice/pico\nbase_model_relation: finetune\n" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match="another base"):
        export(tmp_path / "adapter", tmp_path / "out2", base="alice/pico@main")


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    model = pico.llama()
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_for(model, str(tmp_path / "base"))
    adapter.save(tmp_path / "adapter")
    pico.llama(seed=3).save_pretrained(tmp_path / "other")
    pico.opt().save_pretrained(tmp_path / "opt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "x.tex").write_text("…")
    before = sorted(tmp_path.rglob("*"))
    for base, out, match in (
        (tmp_path / "other", "out", "another base"),
        (tmp_path / "opt", "out", "no tensor|another base"),
        (tmp_path / "empty", "out", "no .safetensors"),
        (None, "thesis", "no checkpoint and is never replaced"),
        ("bundled:nothing", "out", "bundled"),
        ("nokind:x", "out", "no installed package"),
    ):
        with pytest.raises(UserError, match=match):
            export(tmp_path / "adapter", tmp_path / out, base=str(base) if base else None)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "adapter/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())  # as a run and push put it there
    for folder in ("thesis", "adapter"):
        with pytest.raises(UserError, match="no checkpoint"):
            export(tmp_path / "adapter", tmp_path / folder, force=True)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="another base"):
        check_against(adapter, tmp_path / "other")
    assert export(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "other"), check_base=False).exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama"


def test_the_base_is_never_replaced_by_its_export(tmp_path: Path) -> None:
    model = pico.llama()
    model.save_pretrained(tmp_path / "base")
    before = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    weight = model.model.layers[0].self_attn.q_proj.weight
    delta = SparseDelta(torch.tensor([1], dtype=torch.int32), torch.ones(1), tuple(weight.shape))
    SparseAdapter({"model.layers.0.self_attn.q_proj.weight": delta}, {}, AdapterConfig(), {}).save(tmp_path / "adapter")
    with pytest.raises(UserError, match="is the base itself"):
        export(tmp_path / "adapter", tmp_path / "base", str(tmp_path / "base"), force=True, check_base=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == before
