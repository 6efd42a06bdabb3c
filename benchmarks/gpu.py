"""A training step on one GPU: speft against the floor, PEFT LoRA and full fine-tuning, on a 7B-shaped model.

    python benchmarks/gpu.py                                  Qwen2-7B's shapes, random weights in bf16, 4 x 1024 tokens
    python benchmarks/gpu.py --layers 2 --tokens 2x256 --rounds 1 --rank 8     a look
    python benchmarks/gpu.py --device cpu --layers 1 --tokens 1x64             without a GPU: does it run?

One set of weights serves all methods: each is put on, timed and taken off again, in turn, as often as there are rounds; the
base must then have the bits it began with (three layers are compared). Times are those of several steps at once, from an idle
device to an idle device, medians over rounds; peaks are what
the allocator held during the steps, less what it held before the method came. Weights are random: this shows what a step
costs, not what it learns. A global gradient mask on random weights keeps most layers out; `local` gives each its share.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import table

import speft_core as sc
from speft_core.files import atomic_write
from speft_train.architectures import KNOWN

STEPS = 5  # timed at once
GIB = 2**30


@torch.no_grad()
def build(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """The model of that configuration with random weights, made on the device."""
    import transformers
    from transformers.initialization import no_init_weights

    settings = dict(KNOWN[name])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with no_init_weights(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    return model.train()


class Bench:
    """The model, its batch, and the methods that can be put on it and taken off."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.device, self.rank = asked, torch.device(asked.device), asked.rank[0]
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[asked.dtype]
        self.model = build(asked.model, asked.layers, self.dtype, asked.device)
        if asked.checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        rows, length = (int(n) for n in asked.tokens.split("x"))
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(self.model.config.vocab_size, (rows, length), generator=generator).to(self.device)
        self.masks: dict[str, sc.SparsityMask] = {}
        self.notes: dict[str, Any] = {}

    def mask(self, metric: str, scope: str) -> sc.SparsityMask:
        """Made once, on the device; as many entries as LoRA of the rank trains. Its seconds and peak are noted."""
        name = f"{metric} {scope}"
        if name not in self.masks:
            self.reset()
            started, before = time.perf_counter(), self.held()
            batch = {"input_ids": self.ids, "labels": self.ids}
            limit = {} if self.asked.memory_limit is None else {"memory_limit": int(self.asked.memory_limit * GIB)}
            budget = sc.Budget(like_lora_r=self.rank)
            settings = {"targets": "all-linear", "scope": scope, "seed": 0, **limit}
            self.masks[name] = sc.find_mask(self.model, [batch], metric, budget, **settings)
            self.wait()
            seconds = round(time.perf_counter() - started, 2)
            self.notes[f"r{self.rank} {name} mask"] = {"seconds": seconds, "peak GiB": round((self.peak() - before) / GIB, 2)}
        return self.masks[name]

    def floor(self) -> tuple[list[Any], Callable[[], Any]]:
        """All weights frozen: forward and the input gradient."""
        self.model.requires_grad_(False)
        hook = self.model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
        return [], hook.remove

    def sparse(self, metric: str, scope: str, backward: str) -> tuple[list[Any], Callable[[], Any]]:
        """speft with a mask of this metric and plan."""
        tuner = sc.attach(self.model, self.mask(metric, scope), backward=backward)
        rows = tuner.plan().values()
        plans = {p: sum(r.plan == p for r in rows) for p in sorted({r.plan for r in rows})}
        self.notes.setdefault("plans", {})[f"r{self.rank} {metric} {scope} {backward}"] = plans
        return list(tuner.parameters()), tuner.detach

    def lora(self, widened: bool) -> tuple[list[Any], Callable[[], Any]]:
        """PEFT LoRA on all linear layers; its matrices `widened` to fp32, as PEFT does with bf16 models unless told otherwise."""
        import peft

        config = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules="all-linear")
        wrapped = peft.get_peft_model(self.model, config, autocast_adapter_dtype=widened)
        return [p for p in wrapped.parameters() if p.requires_grad], wrapped.unload

    def full(self) -> tuple[list[Any], Callable[[], Any]]:
        """Full fine-tuning by SGD without state, the cheapest there is: the weights do change."""
        self.model.requires_grad_(True)
        return list(self.model.parameters()), lambda: self.model.requires_grad_(False)

    def methods(self) -> dict[str, Callable[[], tuple[list[Any], Callable[[], Any]]]]:
        """Name -> how it is put on: returns what is trained, and how it is taken off."""
        table: dict[str, Callable[[], tuple[list[Any], Callable[[], Any]]]] = {"floor": self.floor}
        for metric, scope in (("gradient", "global"), ("gradient", "local"), ("random", "global")):
            for plan in self.asked.plans:
                label = f"speft {metric}" + (" local" if scope == "local" else "") + ("" if plan == "auto" else f" ({plan})")
                table[label] = lambda metric=metric, scope=scope, plan=plan: self.sparse(metric, scope, plan)
        return table | {"LoRA": lambda: self.lora(True), "LoRA (bf16)": lambda: self.lora(False), "full (SGD)": self.full}

    def step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Forward, backward, update."""
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def measure(self, name: str) -> dict[str, Any]:
        """Seconds a step, and the peak above what was held before."""
        self.reset()
        before = self.held()
        trained, off = self.methods()[name]()
        try:
            kind = torch.optim.SGD if name.startswith("full") else torch.optim.AdamW
            optimizer = kind(trained, lr=1e-5) if trained else None
            for _ in range(2):
                self.step(optimizer)
            self.wait()
            self.reset()
            started = time.perf_counter()
            for _ in range(STEPS):
                self.step(optimizer)
            self.wait()
            seconds = (time.perf_counter() - started) / STEPS
            return {"seconds": seconds, "peak": self.peak() - before, "trained": sum(p.numel() for p in trained)}
        finally:
            off()

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset(self) -> None:
        """Free what is free and forget the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held(self) -> int:
        """Bytes of live tensors on the device."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self) -> int:
        """The most bytes held since the last reset."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def run(self) -> list[dict[str, Any]]:
        """All methods in turn, round by round; full fine-tuning, which changes the weights, only once, at the end."""
        names = [n for n in self.methods() if n == "floor" or any(n.startswith(m) for m in self.asked.methods)]
        linear = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        watched = [linear[0], linear[len(linear) // 2], linear[-1]]
        before = [weight.detach().cpu() for weight in watched]
        found: dict[str, list[dict[str, Any]]] = {}
        often, once = [n for n in names if not n.startswith("full")], [n for n in names if n.startswith("full")]
        rounds = [often if number % 2 == 0 else often[::-1] for number in range(self.asked.rounds)]
        for number, order in enumerate([*rounds, once]):
            for name in order:
                try:
                    found.setdefault(name, []).append(self.measure(name))
                except torch.OutOfMemoryError:
                    found.setdefault(name, []).append({"seconds": float("nan"), "peak": None, "trained": None})
                print(number, name, found[name][-1], flush=True)
                same = all(torch.equal(w.detach().cpu(), b) for w, b in zip(watched, before, strict=True))
                assert same or name in once, f"{name} left the base changed"
        rows = []
        for name in names:
            seconds = statistics.median(f["seconds"] for f in found[name])
            spread = max(f["seconds"] for f in found[name]) / min(f["seconds"] for f in found[name]) - 1
            peaks = [f["peak"] for f in found[name] if f["peak"] is not None]
            rows.append({"method": name, "trained": found[name][0]["trained"], "ms": 1e3 * seconds, "spread": spread,
                         "peak": max(peaks, default=None)})  # fmt: skip
        return self.compared(rows)

    @staticmethod
    def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With ratios to the floor and LoRA."""
        by_name = {row["method"]: row for row in rows}
        for row in rows:
            row["over floor"] = row["ms"] / by_name["floor"]["ms"]
            peaks = row["peak"], by_name["floor"]["peak"]
            row["peak above floor"] = None if None in peaks else peaks[0] - peaks[1]
            if "LoRA" in by_name:
                row["over LoRA"] = row["ms"] / by_name["LoRA"]["ms"]
        return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=KNOWN, default="Qwen/Qwen2-7B")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--tokens", default="4x1024", help="sequences x tokens of a batch")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of LoRA; speft trains as many scalars; a table for each")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["floor", "speft", "LoRA"], help="or how they begin; the floor always")
    parser.add_argument("--plans", nargs="+", default=["auto"], help="backward plans of speft")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--memory-limit", type=float, help="GiB that the saliency pass may take on the device")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    bench, rows = Bench(asked), []
    for rank in asked.rank:
        bench.rank, bench.masks = rank, {}
        rows += [{"rank": rank, **row} for row in bench.run()]
        print(table(rows), flush=True)
    import peft
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    where = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(asked).items()}
    facts = {"gpu": where, **versions, "parameters": sum(p.numel() for p in bench.model.parameters()), **settings}
    print(json.dumps(facts), json.dumps(bench.notes), sep="\n")
    if asked.json:
        atomic_write(asked.json, json.dumps({"facts": facts, "notes": bench.notes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
