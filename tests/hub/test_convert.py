"""Other people's sparse adapters, and differences of checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import pico
from speft_core import SparseAdapter, UserError
from speft_hub.cli import app
from speft_hub.console import run
from speft_hub.convert import convert
from speft_hub.diff import adapter_between, diff_adapters, diff_checkpoints

# PEFT still calls what Transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gr:FutureWarning", "ignore:Sparse invariant checks:UserWarning")


def inputs(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in pico.batch(model).items() if k != "labels"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


@pytest.fixture
def shira(tmp_path: Path) -> torch.Tensor:
    """A base in `base`, a random SHiRA adapter of it in `shira`; the logits that PEFT gives."""
    model = pico.llama()
    model.save_pretrained(tmp_path / "base")
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=1, init_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "shira")
    return expected


def test_shira_both_ways(tmp_path: Path, shira: torch.Tensor) -> None:
    assert convert(tmp_path / "shira", tmp_path / "speft", base=tmp_path / "base") == "shira"
    adapter, model = SparseAdapter.load(tmp_path / "speft"), pico.llama()
    assert not torch.equal(logits(model), shira)
    with adapter.applied(model):
        torch.testing.assert_close(logits(model), shira, rtol=1e-5, atol=1e-6)
    assert set(adapter.deltas) == {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert convert(tmp_path / "speft", tmp_path / "back", to="shira") == "speft"
    original, again = (
        load_file(tmp_path / "shira/adapter_model.safetensors"),
        load_file(tmp_path / "back/adapter_model.safetensors"),
    )
    assert original.keys() == again.keys() and all(torch.equal(original[k], again[k]) for k in original)
    loaded = PeftModel.from_pretrained(pico.llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(loaded), shira, rtol=1e-5, atol=1e-6)
    ours, theirs = ((tmp_path / f / "adapter_model.safetensors").stat().st_size for f in ("speft", "shira"))
    assert ours < 0.8 * theirs


def test_counts_that_shira_cannot_have(tmp_path: Path, shira: torch.Tensor) -> None:
    convert(tmp_path / "shira", tmp_path / "speft", base=tmp_path / "base")
    adapter = SparseAdapter.load(tmp_path / "speft")
    name = next(iter(adapter.deltas))
    delta = adapter.deltas[name]
    adapter.deltas[name] = type(delta)(delta.indices_K[:-1], delta.values_K[:-1], delta.shape)
    adapter.save(tmp_path / "odd")
    with pytest.raises(UserError, match="one whole r"):
        convert(tmp_path / "odd", tmp_path / "back", to="shira")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, k: t.update({k + "indices": t[k + "indices"] + 1000}), "must lie within"),
        (lambda t, k: t.update({k + "indices": -t[k + "indices"] - 1}), "must lie within"),
        (lambda t, k: t.update({k + "indices": t[k + "indices"][:, :-1].contiguous()}), "do not fit"),
        (lambda t, k: t.pop(k + "indices"), "no shira_indices"),
        (lambda t, k: t.update({k + "indices": torch.zeros_like(t[k + "indices"])}), "without duplicates"),
        (lambda t, k: t[k + "weight"].fill_(float("nan")), "finite"),
    ],
)
def test_damaged_shira(tmp_path: Path, shira: torch.Tensor, change: Any, message: str) -> None:
    path = tmp_path / "shira/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(k for k in tensors if k.endswith("shira_indices")).removesuffix("indices"))
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "shira", tmp_path / "speft", base=tmp_path / "base")
    assert not (tmp_path / "speft").exists()


def sparta_folder(folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What SpaRTA's `save(merged=False)` writes: indices one row an entry, parameters as values; returns the merged weights."""
    torch.manual_seed(3)
    indices, deltas, merged = {}, {}, {}
    for name, weight in model.named_parameters():
        keep = 1.0 if name == "score.weight" else 0.0 if "embed" in name else 0.1
        indices[name] = torch.full_like(weight, keep).bernoulli().nonzero().to(torch.int32)
        deltas[name] = torch.nn.Parameter(torch.randn(len(indices[name])).to(dtype))
        changed = weight.detach().clone()
        changed[indices[name].long().unbind(1)] += deltas[name].detach().to(weight.dtype)
        merged[name] = changed
    folder.mkdir()
    torch.save({"indices": indices, "deltas": deltas}, folder / "sparse_deltas.pt")
    torch.save(model.score.weight.data, folder / "head_init.pt")
    (folder / "config.json").write_text(json.dumps({"sparta_pretrained_model": "acme/base", "model_type": "llama"}))
    return merged


def test_sparta(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    base = pico.llama()
    base.save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).eval()
    merged = sparta_folder(tmp_path / "sparta", model, torch.float32)
    assert convert(tmp_path / "sparta", tmp_path / "speft", base=tmp_path / "base") == "sparta"
    adapter = SparseAdapter.load(tmp_path / "speft")
    assert adapter.config.base_model_name_or_path == "acme/base" and set(adapter.dense) == {"score.weight"}
    assert not any("embed" in n for n in adapter.deltas) and any("norm" in n for n in adapter.deltas)
    with adapter.applied(model):
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-6)
    tensors = torch.load(tmp_path / "sparta/sparse_deltas.pt", weights_only=True)
    flat = {f"{kind}.{n}": t.detach().contiguous() for kind in tensors for n, t in tensors[kind].items()}
    (tmp_path / "safe").mkdir()
    save_file(flat, tmp_path / "safe/sparse_deltas.safetensors")
    save_file({"head": model.score.weight.data.clone()}, tmp_path / "safe/head_init.safetensors")
    convert(tmp_path / "safe", tmp_path / "speft2", base=tmp_path / "base")
    other = SparseAdapter.load(tmp_path / "speft2")
    assert all(torch.equal(other.deltas[n].values_K, d.values_K) for n, d in adapter.deltas.items())


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/speft_evil_pickle"),))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"indices": Evil(), "deltas": {}}),
        pickle.dumps(Evil()),
        b"",
        b"not a pickle",
        pickle.dumps({"indices": {1: 2}}),
        pickle.dumps([1, 2]),
        pickle.dumps({"indices": {}, "deltas": {}}),
    ],
)
def test_pickles_that_do_more_than_hold_tensors(tmp_path: Path, content: bytes) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    (tmp_path / "sparta").mkdir()
    (tmp_path / "sparta/sparse_deltas.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "sparta", tmp_path / "speft", base=tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/speft_evil_pickle").exists() and not (tmp_path / "speft").exists()


def test_what_cannot_be_converted_says_why(tmp_path: Path, shira: torch.Tensor) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for source, options, message in (
        ("lora", {}, "of type LORA"),
        ("shira", {}, "--base"),
        ("base", {}, "no adapter that is known"),
        ("shira", {"to": "shira"}, "already"),
        ("shira", {"to": "x"}, "must be speft or shira"),
        ("nothing", {}, "no adapter that is known"),
    ):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / source, tmp_path / "out", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_difference_of_two_checkpoints_as_an_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = pico.llama(dtype=dtype), pico.llama(dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in second.named_parameters():
            if "mlp" in name:
                weight += (torch.rand(weight.shape) < 0.3).to(dtype) * torch.randn(weight.shape).to(dtype) * 10
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    adapter = adapter_between(tmp_path / "a", tmp_path / "b", base_model="acme/base")
    adapter.save(tmp_path / "adapter")
    loaded = SparseAdapter.load(tmp_path / "adapter")
    changed = sum(int((x != y).sum()) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert loaded.nnz == changed > 0 and all("mlp" in n for n in loaded.deltas)
    with loaded.applied(first):
        assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    everything = torch.cat([d.values_K.abs().double() for d in loaded.deltas.values()]).sort(descending=True).values
    for k in (1, 17, changed - 1, changed + 5):
        top = adapter_between(tmp_path / "a", tmp_path / "b", top_k=k)
        assert top.nnz == min(k, changed)
        kept = torch.cat([d.values_K.abs().double() for d in top.deltas.values()]).sort(descending=True).values
        torch.testing.assert_close(kept, everything[: top.nnz])


def test_diff_of_checkpoints_and_adapters(tmp_path: Path) -> None:
    first, second = pico.llama(), pico.llama()
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        dict(second.named_parameters())[name].add_(
            torch.ones(16, 1) @ torch.arange(16.0)[None] + torch.eye(16)[:1].T @ torch.eye(16)[3:4]
        )
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    rows = {r.name: r for r in diff_checkpoints(tmp_path / "a", tmp_path / "b", rank=True)}
    assert rows[name].rank == 2 and rows[name].changed == 241 - 1 + 0 and rows[name].density == 240 / 256
    assert all(r.changed == 0 and r.norm == 0 for n, r in rows.items() if n != name)
    adapter_between(tmp_path / "a", tmp_path / "b").save(tmp_path / "x")
    adapter_between(tmp_path / "a", tmp_path / "b", top_k=100).save(tmp_path / "y")
    (row,) = diff_adapters(tmp_path / "x", tmp_path / "y")
    assert row.kept == (240, 100) and row.overlap == 100 and row.changed == 140
    pico.llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="has shape"):
        list(diff_checkpoints(tmp_path / "a", tmp_path / "wide"))
    pico.opt().save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="architecture"):
        list(diff_checkpoints(tmp_path / "a", tmp_path / "opt"))


def test_a_difference_that_replaces_an_adapter_leaves_nothing_of_it(tmp_path: Path) -> None:
    pico.llama(seed=0).save_pretrained(tmp_path / "a")
    pico.llama(seed=1).save_pretrained(tmp_path / "b")
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "heads.json"):
        (tmp_path / "out" / name).write_text("{}")
    assert run(app, ["convert", *map(str, (tmp_path / "b", tmp_path / "out", "--against", tmp_path / "a", "--force"))]) == 0
    assert SparseAdapter.load(tmp_path / "out").nnz and not (tmp_path / "out/heads.json").exists()
