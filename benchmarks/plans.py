"""The cost model of `backward="auto"` against the clock: every plan on layers of many shapes and densities.

    python benchmarks/plans.py --tokens 1024 --rounds 5            prints the fitted Rates and what auto's choices cost
    python benchmarks/plans.py --dtype bf16 --json plans.json
    python benchmarks/plans.py --device cuda --dtype bf16 --tokens 4096

For each layer and mask (`spread`: anywhere; `gathered`: in a third of the rows and columns, as gradient masks are; `narrow`:
in 3 % of the columns) all plans are timed in turn, and medians taken. `regret` is the time of auto's choice over that of the
fastest plan. The fitted constants are those of ops/cost.py, by least squares on relative errors, none below zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import DTYPES
from report import machine
from scipy.optimize import nnls

from speft_core.ops import cost
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS

SHAPES = {
    "cpu": ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048)),
    "cuda": ((576, 576), (2048, 2048), (512, 3584), (3584, 3584), (18944, 3584), (3584, 18944)),
}
CALLS = {"cpu": 1, "cuda": 10}  # timed at once, as calls to a GPU overlap
DENSITIES = (0.001, 0.0045, 0.02, 0.08)
SHARES = {"gathered": (0.33, 0.33), "spread": (1.0, 1.0), "narrow": (1.0, 0.03)}  # of rows and of columns that a mask may touch


def mask_of(shape: tuple[int, int], density: float, shares: tuple[float, float], seed: int) -> torch.Tensor:
    """Sorted flat indices of `density` of the entries, within these shares of the rows and columns (fewer where those are full)."""
    made = torch.Generator().manual_seed(seed)
    rows, cols = shape
    touched = [max(1, round(n * share)) for n, share in zip(shape, shares, strict=True)]
    few_R, few_C = (torch.randperm(n, generator=made)[:m].sort().values for n, m in zip(shape, touched, strict=True))
    area = few_R.numel() * few_C.numel()
    at = torch.randperm(area, generator=made)[: min(max(1, round(rows * cols * density)), area)].sort().values
    return few_R[at // few_C.numel()] * cols + few_C[at % few_C.numel()]


def seconds_of(plans: dict[str, Any], inputs: Inputs, grad_TO: torch.Tensor, layout: Layout, rounds: int) -> dict[str, float]:
    """Median seconds of each plan, timed in turn."""
    calls = CALLS[grad_TO.device.type]
    times: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(rounds + 1):
        for name, plan in plans.items():
            started = time.perf_counter()
            for _ in range(calls):
                plan.entries(inputs, grad_TO, layout)
            if grad_TO.is_cuda:
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(dtype: torch.dtype, device: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each layer and mask: the seconds of every plan that can run, and what auto chooses."""
    rows = []
    for number, shape in enumerate(SHAPES[torch.device(device).type]):
        weight = torch.zeros(shape, dtype=dtype, device=device)
        x_TI, grad_TO = (torch.randn(tokens, n, device=device).to(dtype) for n in reversed(shape))
        for density in DENSITIES:
            for kind, shares in SHARES.items():
                layout = Layout.of(mask_of(shape, density, shares, number), shape).to(torch.device(device))
                able = {name: PLANS[name] for name in cost.estimates(layout, weight)}
                seconds = seconds_of(able, Inputs([(x_TI, dtype)]), grad_TO, layout, rounds)
                chosen = cost.choose(layout, weight)[0]
                rows.append({
                    "shape": shape, "density": density, "mask": kind, "seconds": seconds,
                    "auto": chosen, "regret": seconds[chosen] / min(seconds.values()),
                    "terms": {name: parts for name, parts in cost.work(layout, weight).items() if name in able},
                })  # fmt: skip
    return rows


def fitted(rows: list[dict[str, Any]], tokens: int) -> dict[str, float]:
    """The constants, in picoseconds a token, that explain the measured times best."""
    names = sorted({term for row in rows for found in row["terms"].values() for term in found})
    matrix, ones = [], []
    for row in rows:
        for plan, found in row["terms"].items():
            picoseconds = row["seconds"][plan] * 1e12 / tokens
            matrix.append([found.get(name, 0.0) / picoseconds for name in names])
            ones.append(1.0)
    solution, _ = nnls(np.array(matrix), np.array(ones))
    return dict(zip(names, solution.tolist(), strict=True))


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows go")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(machine(asked.threads))
    with torch.no_grad():
        rows = measure(DTYPES[asked.dtype], asked.device, asked.tokens, asked.rounds)
    print(f"{'layer':>12} {'density':>8} {'mask':>9}  {'auto':>8} {'regret':>7}   milliseconds")
    for row in rows:
        times = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in sorted(row["seconds"].items(), key=lambda item: item[1]))
        layer = "x".join(map(str, row["shape"]))
        print(f"{layer:>12} {row['density']:>8} {row['mask']:>9}  {row['auto']:>8} {row['regret']:>7.2f}   {times}")
    regrets = [row["regret"] for row in rows]
    print(f"regret: median {statistics.median(regrets):.3f}, mean {statistics.mean(regrets):.3f}, worst {max(regrets):.2f}")
    print("fitted:", ", ".join(f"{name}={value:.3g}" for name, value in fitted(rows, asked.tokens).items()))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
