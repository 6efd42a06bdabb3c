"""A base stored in 16 bits and trained in float32: an export rounds and says so, or is written in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pico
from hub.exported import adapter_for, logits
from speft_core import SparseAdapter, UserError, merge
from speft_hub.checkpoint import Checkpoint
from speft_hub.cli import app
from speft_hub.console import run
from speft_hub.export import export
from speft_hub.widen import widen

ROUNDED = "trained in float32 and the base is stored in bfloat16"


def prepare(root: Path, trained: torch.dtype = torch.float32, tied: bool = True, sharded: bool = False, **made: Any) -> Any:
    """A bf16 base, and an adapter of it as it is in `trained`; that model and the adapter."""
    pico.llama(tied=tied, dtype=torch.bfloat16).save_pretrained(root / "base", max_shard_size=6000 if sharded else "1GB")
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=trained).eval()
    adapter = adapter_for(model, str(root / "base"), **made)
    adapter.save(root / "adapter")
    return model, adapter


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_float32_gives_the_bits_that_were_measured(tmp_path: Path, tied: bool, sharded: bool) -> None:
    model, adapter = prepare(tmp_path, tied=tied, sharded=sharded)
    said: list[str] = []
    export(tmp_path / "adapter", tmp_path / "narrow", say=said.append)
    assert len(said) == 1 and ROUNDED in said[0] and "--dtype float32" in said[0]
    export(tmp_path / "adapter", tmp_path / "wide", dtype="float32", say=said.append)
    assert len(said) == 1
    assert ROUNDED in (tmp_path / "narrow/README.md").read_text() and "float32" not in (tmp_path / "wide/README.md").read_text()
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with adapter.applied(model):
        assert torch.equal(logits(wide), logits(model))
        narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32).eval()
        assert not torch.equal(logits(narrow), logits(model))
    stored = Checkpoint(tmp_path / "wide")
    assert {p.dtype for p in stored.places.values()} == {torch.float32} and (len(stored.files) > 1) == sharded
    if sharded:
        index = json.loads((tmp_path / "wide/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in stored.places.values())


def test_what_was_trained_in_16_bits_is_not_rounded(tmp_path: Path) -> None:
    said: list[str] = []
    prepare(tmp_path, torch.bfloat16, dtype=torch.float32)  # values kept in float32: training rounds them into the weights, too
    export(tmp_path / "adapter", tmp_path / "out", say=said.append)
    assert not said and "figures" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_a_head_alone_and_a_merged_adapter(tmp_path: Path, trained: torch.dtype) -> None:
    """Neither has hashes of entries, which tell in what the weights were trained: what was learned tells."""
    model, adapter = prepare(tmp_path, trained)
    said: list[str] = []
    for made in (
        SparseAdapter({}, {"score.weight": torch.randn(3, 16, dtype=trained)}, adapter.config, {}),
        merge([adapter, adapter], method="weighted", weights=[0.5, 0.25]),
    ):
        said.clear()
        made.save(tmp_path / "adapter")
        export(tmp_path / "adapter", tmp_path / "out", say=said.append, force=True)
        assert [ROUNDED in line for line in said] == ([True] if trained == torch.float32 else [])


def test_a_new_head_is_wide_too(tmp_path: Path) -> None:
    pico.llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32).eval()
    head = {"score.weight": torch.randn(3, 16)}
    adapter = adapter_for(model, str(tmp_path / "base"), dense=head, skip="score")
    adapter.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert torch.equal(load_file(tmp_path / "out/model-heads.safetensors")["score.weight"], head["score.weight"])
    with adapter.applied(model):
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_every_other_tensor_stays_as_it_is(tmp_path: Path) -> None:
    """Whole numbers, flags, nothing at all, odd sizes that would leave the next tensor unaligned, float64."""
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.tensor([True, False, True]),
        "c": torch.arange(3, dtype=torch.int16),
        "d": torch.randn(7).half(),
        "e": torch.empty(0, 4, dtype=torch.bfloat16),
        "f": torch.randn(3, dtype=torch.float64),
        "g": torch.tensor(1.5, dtype=torch.bfloat16),
        "h": torch.arange(3, dtype=torch.int8),
        "i": torch.randn(2),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    widen(tmp_path)
    wide = load_file(tmp_path / "model.safetensors")
    assert set(wide) == set(tensors) and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        assert wide[name].dtype == expected.dtype and torch.equal(wide[name], expected), name
    with (tmp_path / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length % 8 == 0 and json.loads(file.read(length))["__metadata__"] == {"format": "pt"}
    stored = Checkpoint(tmp_path)
    assert all(place.start % place.dtype.itemsize == 0 for place in stored.places.values())
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    widen(tmp_path)  # nothing narrow is left: nothing is written
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_tensors_in_an_order_that_is_not_that_of_safetensors(tmp_path: Path) -> None:
    """Three numbers of two bytes, then a 16-bit weight: where it stands it would not be aligned once it has four bytes."""
    header = {
        "a": {"dtype": "I16", "shape": [3], "data_offsets": [0, 6]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [6, 10]},
    }
    head = json.dumps(header).encode()
    numbers, weight = torch.tensor([1, 2, 3], dtype=torch.int16), torch.tensor([0.5, -3.0], dtype=torch.bfloat16)
    data = numbers.numpy().tobytes() + weight.view(torch.int16).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    widen(tmp_path)
    stored = Checkpoint(tmp_path)
    assert all(place.start % place.dtype.itemsize == 0 for place in stored.places.values())
    with stored.tensor("a") as a, stored.tensor("b") as b:
        assert torch.equal(a, numbers) and torch.equal(b, weight.float())


def test_the_configuration_says_float32_whatever_it_said(tmp_path: Path) -> None:
    prepare(tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    for said in ({"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "torch_dtype": "bfloat16", "x": 1}}, {}):
        (tmp_path / "base/config.json").write_text(json.dumps(config | said))
        export(tmp_path / "adapter", tmp_path / "out", dtype="float32", force=True)
        made = json.loads((tmp_path / "out/config.json").read_text())
        assert made["dtype"] == "float32" and made.get("torch_dtype", "float32") == "float32"
        if said:
            assert made["text_config"] == {"dtype": "float32", "torch_dtype": "float32", "x": 1}


def test_what_cannot_be_written_in_float32(tmp_path: Path) -> None:
    prepare(tmp_path)
    for dtype in ("float16", "fp32"):
        with pytest.raises(UserError, match=f"dtype must be float32.*got '{dtype}'"):
            export(tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="quantized"):
        export(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path)
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--json"]
    assert run(app, words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": str(tmp_path / "out")}
    assert err.startswith("note: ") and ROUNDED in err and err.count("\n") == 1
    assert run(app, [*words, "--dtype", "float32", "--force"]) == 0
    assert capsys.readouterr().err == ""
