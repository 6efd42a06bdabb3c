"""Adapter files: bytes a parameter beside PEFT's LoRA and SHiRA, decoding speed, and loading and applying at the size of a 7B model.

    python benchmarks/adapter_io.py            40,370,176 scalars in q, k, v, o of Qwen2-7B; needs 4 GB of memory and 1 of disk
    python benchmarks/adapter_io.py --layers 1

Weights and values are random bf16; the fingerprint of the base is in the file and checked. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, gaps
from speft_core.fingerprint import entries_hash, fingerprint
from speft_core.random_mask import random_indices

SHAPES = {"q_proj": (3584, 3584), "k_proj": (512, 3584), "v_proj": (512, 3584), "o_proj": (3584, 3584)}
RANK = 64  # LoRA of this rank on these matrices has as many parameters: 1,441,792 a layer


class Layers(nn.Module):
    """The attention projections of so many layers, bf16, random."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(c, r, bias=False, dtype=torch.bfloat16, device="meta") for n, (r, c) in SHAPES.items()})
            for _ in range(count)
        )
        self.to_empty(device="cpu")
        self.config = {"model_type": "custom"}
        draw = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            weight.requires_grad_(False).normal_(std=0.02, generator=draw)


def adapter_of(model: Layers, random_mask: bool) -> SparseAdapter:
    """As many scalars as LoRA has, spread evenly over the weights."""
    total = sum(p.numel() for p in model.parameters())
    k = sum(RANK * (r + c) for r, c in SHAPES.values()) * len(model.layers)
    deltas, prints = {}, {}
    for name, weight in model.named_parameters():
        count = round(k * weight.numel() / total)
        indices_K = random_indices(0, name, weight.numel(), count)
        deltas[name] = SparseDelta(indices_K, (0.01 * torch.randn(count)).bfloat16(), tuple(weight.shape))
        prints[name] = fingerprint(weight, indices_K)
    origin = {"seed": 0, "mode": "exact"} if random_mask else None
    return SparseAdapter(deltas, {}, AdapterConfig(random=origin), prints)


def size(folder: Path) -> int:
    """Bytes of the two files that are the adapter."""
    return sum((folder / f).stat().st_size for f in ("adapter_config.json", "adapter_model.safetensors"))


def peft_size(folder: Path, layers: int, method: str) -> tuple[int, int]:
    """(parameters, bytes) of PEFT's adapter on the same matrices, in bf16."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    kinds = {"LoRA": LoraConfig, "SHiRA": ShiraConfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Layers(layers), kinds[method](r=RANK, target_modules=list(SHAPES)))
        model = model.to(torch.bfloat16)
        model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), size(folder)


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decoding(rounds: int = 15) -> list[tuple[float, float]]:
    """(density, MB of int32 indices decoded a second on one thread, best of the rounds) on one matrix of 3584 x 18944."""
    found = []
    numel = 3584 * 18944
    for density in (0.005, 0.05):
        indices_K = random_indices(0, "x", numel, round(numel * density))
        code = gaps.encode(indices_K)
        best = min(seconds(lambda c=code, i=indices_K: gaps.decode(c, i.numel(), numel)) for _ in range(rounds))
        found.append((density, indices_K.numel() * 4 / best / 1e6))
    return found


def loading(folder: Path, model: Layers, rounds: int) -> list[tuple[float, float, float]]:
    """Seconds of load, apply and restore, round by round; the weights must come back bit for bit."""
    before = [entries_hash(p.data) for p in model.parameters()]
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        adapter = SparseAdapter.load(folder)
        loaded = time.perf_counter()
        handle = adapter.apply(model)
        applied = time.perf_counter()
        handle.restore()
        found.append((loaded - start, applied - loaded, time.perf_counter() - applied))
    assert before == [entries_hash(p.data) for p in model.parameters()], "restoring lost bits"
    return found


def main(words: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as room:
        rows, times = [], []
        for label, random_mask in (("speft, random mask", True), ("speft, any mask", False)):
            model, folder = Layers(asked.layers), Path(room) / "ours"
            adapter = adapter_of(model, random_mask)
            adapter.save(folder)
            rows.append((label, adapter.nnz, size(folder)))
            del adapter
            if not random_mask:
                times = loading(folder, model, asked.rounds)
            del model
        nnz = rows[-1][1]
        for method in ("LoRA", "SHiRA"):
            few = min(asked.layers, 4)  # their bytes a parameter do not depend on the number of layers
            count, held = peft_size(Path(room) / method, few, method)
            rows.append((f"PEFT {method}, r = {RANK}", count * asked.layers // few, held * asked.layers // few))
    print("| file | parameters | bytes | bytes a parameter |\n|---|---:|---:|---:|")
    for label, count, held in rows:
        print(f"| {label} | {count:,} | {held:,} | {held / count:.2f} |")
    print()
    for density, rate in decoding():
        print(f"decoding, density {density:.1%}: {rate:,.0f} MB of indices a second on one thread")
    load, apply, restore = (statistics.median(column) for column in zip(*times, strict=True))
    sums = [a + b for a, b, _ in times]
    print(
        f"{nnz:,} parameters, {asked.threads} threads, median of {asked.rounds}: load {load:.2f} s, apply {apply:.2f} s, "
        f"restore {restore:.2f} s; load + apply {statistics.median(sums):.2f} s ({min(sums):.2f} to {max(sums):.2f})"
    )


if __name__ == "__main__":
    main()
