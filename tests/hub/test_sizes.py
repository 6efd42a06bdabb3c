"""Sizes beside PEFT's formats, and speed of loading: the figures the cards and the documentation promise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, gaps
from speft_core.random_mask import random_indices

pytestmark = pytest.mark.filterwarnings("ignore:`is_gr:FutureWarning")

ROWS, COLUMNS, LAYERS = 576, 1536, 6
NNZ = round(0.005 * ROWS * COLUMNS)


def body(folder: Path) -> int:
    return sum((folder / f).stat().st_size for f in ("adapter_config.json", "adapter_model.safetensors"))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS))
        self.config = {"model_type": "custom"}


@pytest.mark.parametrize("random, most", [(False, 3.4), (True, 2.1)])
def test_bytes_a_parameter(tmp_path: Path, random: bool, most: float) -> None:
    deltas = {
        f"layers.{i}.weight": SparseDelta(
            random_indices(3, f"layers.{i}.weight", ROWS * COLUMNS, NNZ), torch.randn(NNZ).bfloat16(), (ROWS, COLUMNS)
        )
        for i in range(LAYERS)
    }
    origin = {"seed": 3, "mode": "exact"} if random else None
    SparseAdapter(deltas, {}, AdapterConfig(random=origin)).save(tmp_path / "ours")
    per_parameter = body(tmp_path / "ours") / (NNZ * LAYERS)
    assert per_parameter <= most
    loaded = SparseAdapter.load(tmp_path / "ours")
    assert all(torch.equal(loaded.deltas[n].indices_K, d.indices_K) for n, d in deltas.items())
    # Beside it: PEFT's LoRA and SHiRA of at least as many parameters.
    for config in (
        LoraConfig(r=2, target_modules=[str(i) for i in range(LAYERS)]),
        ShiraConfig(r=2, target_modules=[str(i) for i in range(LAYERS)]),
    ):
        model = get_peft_model(Stack(), config)
        model.save_pretrained(tmp_path / config.peft_type)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 2 * (ROWS + COLUMNS) * LAYERS
        theirs = (tmp_path / config.peft_type / "adapter_model.safetensors").stat().st_size / trained
        print(f"{config.peft_type.value}: {theirs:.2f} bytes a parameter, ours {per_parameter:.2f}")
        assert per_parameter < 0.9 * theirs


def test_decoding_speed() -> None:
    """At least 200 MB/s of indices out on an idle core; asked for a tenth here, for machines that are busy."""
    numel = 3584 * 18944
    indices = random_indices(0, "x", numel, numel // 200)
    code = gaps.encode(indices)
    best = min(_seconds(lambda: gaps.decode(code, indices.numel(), numel)) for _ in range(20))
    rate = indices.numel() * 4 / best / 1e6
    print(f"decode: {rate:.0f} MB/s of indices")
    assert rate > 20


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


@pytest.mark.real
def test_loading_and_applying_forty_million_parameters(tmp_path: Path) -> None:
    """Qwen2-7B's q, k, v, o of 28 layers, random values; at most 3 s on an idle machine."""
    shapes = {"q_proj": (3584, 3584), "k_proj": (512, 3584), "v_proj": (512, 3584), "o_proj": (3584, 3584)}
    total = 28 * sum(r * c for r, c in shapes.values())
    model, deltas = nn.Module(), {}
    model.layers = nn.ModuleList(
        nn.ModuleDict({n: nn.Linear(c, r, bias=False, dtype=torch.bfloat16, device="meta") for n, (r, c) in shapes.items()})
        for _ in range(28)
    )
    model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        k = round(40_370_176 * weight.numel() / total)
        deltas[name] = SparseDelta(random_indices(0, name, weight.numel(), k), torch.randn(k).bfloat16(), tuple(weight.shape))
        weight.data.zero_()
    SparseAdapter(deltas).save(tmp_path / "big")
    size = body(tmp_path / "big")
    start = time.perf_counter()
    adapter = SparseAdapter.load(tmp_path / "big")
    middle = time.perf_counter()
    handle = adapter.apply(model)
    end = time.perf_counter()
    handle.restore()
    print(f"{adapter.nnz:,} parameters, {size / adapter.nnz:.2f} bytes each")
    print(f"load {middle - start:.2f} s, apply {end - middle:.2f} s")
    assert end - start < 3.0
