"""Time and memory of the gradient pass on a real model, beside forward + backward of the frozen model and a training step.

    python benchmarks/saliency_pass.py --data ../shared/data/gsm8k/train.jsonl --examples 64

Each measurement runs in a process of its own, since peak memory is the process's. `floor`: forward + backward with all weights
frozen and the embeddings' output requiring grad. `pass`: find_mask with metric gradient on the same batches. `step`: attach
and AdamW steps on the same batches. Prints one line of JSON each, and one with the ratios and whether all masks are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import speft_core as sc
from speft_core.saliency.calibration import Calibration
from speft_core.saliency.passes import Pass, mean_gradient
from speft_core.targets import resolve_targets


def batches_of(tokenizer: Any, path: str, examples: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Questions and answers of a JSON Lines file; labels on the answers alone."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()[:examples]]
    pairs = [(tokenizer(f"Question: {r['question']}\nAnswer:").input_ids, tokenizer(" " + r["answer"]).input_ids) for r in rows]
    found = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        length = max(len(q) + len(a) for q, a in part)
        fill = [length - len(q) - len(a) for q, a in part]
        batch = {
            "input_ids": [q + a + [0] * f for (q, a), f in zip(part, fill, strict=True)],
            "attention_mask": [[1] * (len(q) + len(a)) + [0] * f for (q, a), f in zip(part, fill, strict=True)],
            "labels": [[-100] * len(q) + a + [-100] * f for (q, a), f in zip(part, fill, strict=True)],
        }
        found.append({k: torch.tensor(v) for k, v in batch.items()})
    return found


def loaded(arguments: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model in fp32 and its batches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from speft_train import bundled

    name = arguments.model
    where = bundled.folder(name) if name.startswith(bundled.PREFIX) else name
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    return model, batches_of(AutoTokenizer.from_pretrained(where), arguments.data, arguments.examples, arguments.batch)


def peak_bytes() -> int:
    """The process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def floor(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Forward + backward of the frozen model."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    model(**batches[0]).loss.backward()
    started = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
    return {"seconds": time.perf_counter() - started}


def saliency(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The gradient pass, selection included."""
    budget = sc.Budget(density=arguments.density, of="targets")
    started = time.perf_counter()
    mask = sc.find_mask(model, batches, budget=budget, targets=arguments.targets, memory_limit=arguments.memory_limit)
    seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    for name, indices_K in mask.indices.items():
        digest.update(name.encode() + indices_K.numpy().tobytes())
    mask.save(arguments.mask)
    return {"seconds": seconds, "k": mask.nnz, "mask": digest.hexdigest()[:16]}


def step(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Training steps with the mask that was found, on the same batches."""
    tuner = sc.attach(model, sc.SparsityMask.load(arguments.mask))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-4)
    started = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - started}


def interleaved(model: Any, batches: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Floor and pass in turn in one process, by the CPU seconds that it used; for a machine that is not idle.

    The pass is without the selection, which is timed by itself: it does not grow with the number of examples.
    """
    names = resolve_targets(model, arguments.targets)
    floors, passes = [], []
    model.requires_grad_(False)
    for _ in range(arguments.rounds + 1):
        hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
        started = time.process_time()
        for batch in batches:
            model(**batch).loss.backward()
        floors.append(time.process_time() - started)
        hook.remove()
        started = time.process_time()
        sums = mean_gradient(Pass(model, Calibration(model, batches, None), names), names)
        passes.append(time.process_time() - started)
    started = time.process_time()
    sc.find_mask(model, metric=sums, budget=sc.Budget(density=arguments.density, of="targets"), targets=arguments.targets)
    ratios = [p / f for f, p in zip(floors[1:], passes[1:], strict=True)]  # the first round warms up
    return {
        "floor_cpu_seconds": [round(t, 2) for t in floors[1:]], "pass_cpu_seconds": [round(t, 2) for t in passes[1:]],
        "selection_cpu_seconds": round(time.process_time() - started, 2), "pass_over_floor": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)], "threads": torch.get_num_threads(),
    }  # fmt: skip


KINDS = {"floor": floor, "pass": saliency, "step": step, "interleaved": interleaved}


def main() -> None:
    """Run every kind in a child, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSON Lines with question and answer")
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--memory-limit", type=int, default=None, help="bytes for accumulators (with --kind)")
    parser.add_argument("--limits", type=int, nargs="*", default=[64 << 20], help="memory limits to compare with no limit")
    parser.add_argument("--rounds", type=int, default=3, help="of --kind interleaved")
    parser.add_argument("--kind", choices=KINDS, help="run one measurement in this process")
    parser.add_argument("--mask", default=str(Path(tempfile.gettempdir()) / "saliency_pass_mask.safetensors"))
    arguments = parser.parse_args()
    if arguments.kind:
        model, batches = loaded(arguments)
        before = peak_bytes()
        result = KINDS[arguments.kind](model, batches, arguments)
        result |= {"peak_megabytes": round(peak_bytes() / 1e6), "loaded_megabytes": round(before / 1e6)}
        print(json.dumps({"kind": arguments.kind, "memory_limit": arguments.memory_limit, **result}))
        return

    def child(kind: str, limit: int | None = None) -> dict[str, Any]:
        command = [sys.executable, *sys.argv, "--kind", kind, *([] if limit is None else ["--memory-limit", str(limit)])]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        print(line, flush=True)
        return json.loads(line)

    base, free = child("floor"), child("pass")
    limited = [child("pass", limit) for limit in arguments.limits]
    trained = child("step")
    summary = {
        "pass_over_floor": round(free["seconds"] / base["seconds"], 3),
        "limited_peak_over_step_peak": [round(r["peak_megabytes"] / trained["peak_megabytes"], 3) for r in limited],
        "unlimited_peak_over_step_peak": round(free["peak_megabytes"] / trained["peak_megabytes"], 3),
        "masks_equal": all(r["mask"] == free["mask"] for r in limited),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
