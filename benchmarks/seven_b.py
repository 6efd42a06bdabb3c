"""A 7B-shaped run on one machine: mask, three optimizer steps, adapter saved. Memory and seconds of each stage.

    python benchmarks/seven_b.py                     Qwen2-7B's configuration, 15 GB of random weights in bfloat16
    python benchmarks/seven_b.py --layers 2 --k 2883584

Weights are random, so the run shows what 7B costs, not what it learns. Prints a table, then one line of JSON. `peak` is the
process's resident high-water mark in all, `training peak` that of the optimizer steps alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import speft_core as sc
from speft_core.ops.matmul import slow_on_cpu
from speft_train import memory
from speft_train.architectures import KNOWN

MODEL, TARGETS, K = "Qwen/Qwen2-7B", ["q_proj", "k_proj", "v_proj", "o_proj"], 40_370_176
GIB = 2**30
POOL = 1 << 22  # random numbers drawn once; tensors are made of stretches of them
TILE = 1 << 24  # elements of a weight widened at a time: 64 MB of fp32
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "TRANSFORMERS_VERBOSITY": "error"}  # freed blocks go back to the system


@torch.no_grad()
def build(layers: int | None) -> Any:
    """The model with random weights, filled tensor by tensor; nothing but the weights is ever held."""
    import transformers
    from transformers.initialization import no_init_weights

    settings = dict(KNOWN[MODEL])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).mul_(config.initializer_range).to(torch.bfloat16).repeat(2)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        for part in parameter.view(-1).split(POOL):
            start = int(torch.randint(POOL, (), generator=generator))
            part.copy_(pool[start : start + part.numel()])
    return model.eval()


class _Widened(torch.autograd.Function):
    """x Wᵀ and grad W of a frozen weight, a tile of rows at a time in fp32: PyTorch's own backward is a hundred times slower."""

    tile = torch.empty(0)

    @staticmethod
    def tiles(weight_OI: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows in fp32); each tile is gone when the next one comes."""
        if not _Widened.tile.numel():
            _Widened.tile = torch.empty(TILE)
        step = TILE // weight_OI.shape[1]
        for first in range(0, weight_OI.shape[0], step):
            rows = weight_OI[first : first + step]
            yield first, _Widened.tile[: rows.numel()].view(rows.shape).copy_(rows)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_OI)
        wide, y = x.reshape(-1, x.shape[-1]).float(), x.new_empty(x[..., 0].numel(), weight_OI.shape[0])
        for first, rows in _Widened.tiles(weight_OI):
            y[:, first : first + rows.shape[0]] = wide @ rows.T
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight_OI,), (grad,) = ctx.saved_tensors, grads
        wide = grad.reshape(-1, grad.shape[-1]).float()
        grad_x = torch.zeros(wide.shape[0], weight_OI.shape[1])
        for first, rows in _Widened.tiles(weight_OI):
            grad_x.addmm_(wide[:, first : first + rows.shape[0]], rows)
        return grad_x.to(grad.dtype).view(*grad.shape[:-1], -1), None


def _widened(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Widened.apply(x, weight_OI)
    return y if bias_O is None else y + bias_O


@contextmanager
def usable_speed(model: nn.Module, known: Callable[[str], bool]) -> Iterator[None]:
    """On a CPU without bfloat16 products, linear layers that speft does not compute (`known` by weight) do so in fp32."""
    modules = [m for n, m in model.named_modules() if type(m) is nn.Linear and not known(f"{n}.weight")]
    modules = [m for m in modules if slow_on_cpu(m.weight.dtype)]
    for module in modules:
        module.forward = functools.partial(_widened, module.weight, module.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


class Stages:
    """Seconds, and the resident high-water mark, of each stage."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        memory.reset_peak()
        started, worked = time.perf_counter(), time.process_time()
        yield
        took, worked = time.perf_counter() - started, time.process_time() - worked
        row = {"stage": name, "seconds": round(took, 1), "cpu_seconds": round(worked, 1), "peak_gib": memory.peak_bytes() / GIB}
        self.rows.append(row)
        print(f"{name:<14} {took:>8.1f} s {worked:>8.1f} CPU s {row['peak_gib']:>8.2f} GiB", flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages; the figures."""
    stages, started, worked = Stages(), time.perf_counter(), time.process_time()
    with stages.stage("build"):
        model = build(arguments.layers)
    ids = torch.randint(model.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    watched = model.model.layers[0].self_attn.q_proj.weight
    before = hashlib.sha256(watched.detach().view(torch.uint8).numpy()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        with stages.stage("mask"), usable_speed(model, lambda name: name.split(".")[-2] in TARGETS):
            mask = sc.find_mask(model, [batch], budget=sc.Budget(k=arguments.k), targets=TARGETS)
        assert mask.nnz == arguments.k
        with stages.stage("attach"):
            tuner = sc.attach(model, mask)
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-4)
        losses = []
        for number in range(1, 4):
            with stages.stage(f"train: step {number}"), usable_speed(model, lambda name: name in tuner.values):
                loss = model(**batch, use_cache=False).loss
                losses.append(loss.item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del loss
        del optimizer
        with stages.stage("save"):
            tuner.adapter(base_model_name_or_path=MODEL).save(Path(folder) / "adapter")
        size = sum(f.stat().st_size for f in (Path(folder) / "adapter").iterdir())
        with stages.stage("detach"):
            tuner.detach()
        reloaded = sc.SparseAdapter.load(Path(folder) / "adapter")
        assert sum(d.values_K.numel() for d in reloaded.deltas.values()) == arguments.k
    assert hashlib.sha256(watched.detach().view(torch.uint8).numpy()).hexdigest() == before
    assert losses[-1] < losses[0]
    return {
        "model": MODEL,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "k": arguments.k,
        "tokens": arguments.tokens,
        "losses": [round(x, 4) for x in losses],
        "adapter_bytes": size,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "peak_gib": round(max(r["peak_gib"] for r in stages.rows), 2),
        "training_peak_gib": round(max(r["peak_gib"] for r in stages.rows if r["stage"].startswith("train")), 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stages": [{**r, "peak_gib": round(r["peak_gib"], 2)} for r in stages.rows],
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--k", type=int, default=K, help="scalars to train")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # malloc reads it at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    print(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
