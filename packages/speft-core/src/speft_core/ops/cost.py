"""The cost model behind `backward="auto"`: which plan is fastest for a layout, from nanoseconds measured once per kind of machine.

The choice must be the same in every process of one machine, or a resumed run would not repeat its bits; so the model has
constants per kind of machine (benchmarks/plans.py measures them) and times nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import native
from .layout import Layout
from .matmul import has_tiles, slow_on_cpu


@dataclass(frozen=True)
class Rates:
    """Picoseconds on two cores, per token: of one multiplication in a dense product and in each SDDMM, and of moving one number."""

    product: float
    native: float
    sampled: float
    gather: float
    spread: float  #: moving one number into native.c's blocks


# Measured by benchmarks/plans.py: fp32 with AVX2 (and as good with AVX-512), bf16 with AVX-512. The others are estimates.
CPU_FP32 = Rates(product=14, native=40, sampled=65, gather=850, spread=1000)
CPU_BF16 = Rates(product=17, native=34, sampled=63, gather=1500, spread=540)
CPU_TILES_BF16 = Rates(product=4, native=34, sampled=63, gather=1500, spread=540)
CPU_SLOW_BF16 = Rates(product=80, native=40, sampled=65, gather=500, spread=1000)
CUDA = Rates(product=0.01, native=1, sampled=0.5, gather=0.2, spread=1)


def rates_for(weight: torch.Tensor) -> Rates:
    """The constants for weights of this dtype on this kind of device."""
    if weight.device.type != "cpu":
        return CUDA
    if weight.dtype in (torch.bfloat16, torch.float16):
        if slow_on_cpu(weight.dtype):
            return CPU_SLOW_BF16
        return CPU_TILES_BF16 if has_tiles() else CPU_BF16
    return CPU_FP32


def estimates(layout: Layout, weight: torch.Tensor) -> dict[str, float]:
    """Plan -> picoseconds a token; only plans that can run."""
    rates = rates_for(weight)
    rows, columns, outputs = layout.rows_R.numel(), layout.cols_C.numel(), layout.shape[0]
    found = {
        "compact": rows * columns * rates.product + (rows + columns) * rates.gather,
        "sampled": layout.nnz * rates.sampled + 3 * (rows + columns) * rates.gather,
        "dense": outputs * columns * rates.product + columns * rates.gather,
    }
    if native.fits(weight):
        found["native"] = layout.nnz * rates.native + (rows + columns) * rates.spread
    return found


def choose(layout: Layout, weight: torch.Tensor) -> tuple[str, str]:
    """The cheapest plan's name and the reason, with the runner-up."""
    ranked = sorted(estimates(layout, weight).items(), key=lambda item: item[1])
    (name, cost), (second, other) = ranked[:2]
    rows, columns = layout.rows_R.numel(), layout.cols_C.numel()
    about = f"{layout.nnz} entries in {rows} rows x {columns} columns ({layout.touched_area:.1%} of the area)"
    return name, f"{about}: {cost / 1000:.1f} ns a token, {second} {other / 1000:.1f}"
