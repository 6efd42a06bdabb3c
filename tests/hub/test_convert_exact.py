"""A difference of two checkpoints is exact, or says what it could not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
from speft_core import SparseAdapter, UserError
from speft_hub.cli import app
from speft_hub.console import run
from speft_hub.diff import adapter_between

NAME = "model.layers.0.mlp.up_proj.weight"


def edited(root: Path, dtype: torch.dtype, change: torch.Tensor, base: torch.dtype = torch.float32) -> torch.Tensor:
    """A base in `a` and in `b` the same in another dtype, with one tensor's first entries changed; returns that tensor of `b`."""
    pico.llama(dtype=base).save_pretrained(root / "a")
    pico.llama(dtype=base).to(dtype).save_pretrained(root / "b")
    stored = load_file(root / "b/model.safetensors")
    stored[NAME].view(-1)[: len(change)] = change.to(dtype)
    save_file(stored, root / "b/model.safetensors", metadata={"format": "pt"})
    return stored[NAME]


def test_what_the_bases_dtype_cannot_hold_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = pico.llama(dtype=torch.bfloat16).state_dict()[NAME].view(-1)[:4].float()
    step = torch.tensor([1.0, 2**-12, 2**-12, 0.0])  # one that bf16 has room for, two that it rounds away
    wanted = torch.cat([(flat[:1] + 1).bfloat16().float(), flat[1:3] * (1 + step[1:3]), flat[3:] + 1.0001])
    edited(tmp_path, torch.float32, wanted, torch.bfloat16)
    words = ["convert", tmp_path / "b", tmp_path / "out", "--against", tmp_path / "a"]
    assert run(app, [*map(str, words), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rounded"] == 3 and said.err.startswith("note: 3 entries of") and said.err.count("\n") == 1
    adapter = SparseAdapter.load(tmp_path / "out")
    assert adapter.config.extra["rounded"] == 3
    assert adapter.deltas[NAME].indices_K.tolist() == [0, 3]  # the others stay as they are in bf16
    assert bool((adapter.deltas[NAME].values_K != 0).all())
    model = pico.llama(dtype=torch.bfloat16)
    with adapter.applied(model):
        assert torch.equal(model.state_dict()[NAME].view(-1)[:4], wanted.bfloat16())


def test_a_narrower_checkpoint_is_no_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = edited(tmp_path, torch.bfloat16, torch.tensor([3.0, -0.001]))
    assert run(app, ["convert", *map(str, (tmp_path / "b", tmp_path / "out", "--against", tmp_path / "a"))]) == 0
    assert capsys.readouterr().err == ""
    model, adapter = pico.llama(), SparseAdapter.load(tmp_path / "out")
    assert "rounded" not in adapter.config.extra
    with adapter.applied(model):
        assert torch.equal(model.state_dict()[NAME], wanted.float())


@pytest.mark.parametrize(
    "dtype, change, message",
    [
        (torch.float32, [1e-25], r"up_proj\.weight: no 64-bit number added takes \S+ to 1e-25 exactly"),
        (torch.float32, [torch.inf], r"up_proj\.weight holds NaN or infinity in .*b"),
        (torch.float64, [1e300], r"up_proj\.weight holds what torch\.float32, the base's dtype, cannot in .*b"),
    ],
)
def test_what_no_adapter_reaches_is_refused(tmp_path: Path, dtype: torch.dtype, change: list[float], message: str) -> None:
    edited(tmp_path, dtype, torch.tensor(change, dtype=dtype))
    with pytest.raises(UserError, match=message):
        adapter_between(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("change, dtype", [([0.0], torch.float32), ([1e-9], torch.float64)])
def test_the_narrowest_dtype_that_is_exact(tmp_path: Path, change: list[float], dtype: torch.dtype) -> None:
    """A weight that becomes a thousand-millionth of itself needs 64 bits; one that becomes zero does not."""
    wanted = edited(tmp_path, torch.float32, torch.tensor(change))
    adapter, model = adapter_between(tmp_path / "a", tmp_path / "b"), pico.llama()
    assert adapter.deltas[NAME].values_K.dtype == dtype
    with adapter.applied(model):
        assert torch.equal(model.state_dict()[NAME], wanted)
