"""The cost model behind `backward="auto"`: which plan is fastest for a layout, from nanoseconds measured once per kind of machine.

The choice must be the same in every process of one machine, or a resumed run would not repeat its bits; so the model has
constants per kind of machine (benchmarks/plans.py measures them) and times nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import native, triton_turn
from .blocks import WHOLE_ABOVE
from .cut import VECTOR, kind_of
from .layout import Layout
from .matmul import has_tiles, slow_on_cpu


@dataclass(frozen=True)
class Rates:
    """Picoseconds per token, on two cores or one GPU: of a multiplication in a dense product and in each SDDMM, of moving a number."""

    product: float
    native: float
    sampled: float
    gather: float
    turn: float  #: gathering one number for `sampled`, where it lies beside that of the next token
    spread: float  #: moving one number into native.c's blocks
    start: float = 0.0  #: what `sampled` takes longer to start, spread over a batch of 4,096 tokens
    operators: float = 0.0  #: what the operators of `compact` and `dense` take whatever their size, spread over 1,024 tokens


# Measured by benchmarks/plans.py: fp32 with AVX2 (and as good with AVX-512), bf16 with AVX-512 and with AMX, bf16 on an H200. The others
# are estimates.
CPU_FP32 = Rates(product=14, native=40, sampled=65, gather=850, turn=2550, spread=1000, operators=300_000)
CPU_BF16 = Rates(product=12, native=24, sampled=62, gather=1500, turn=2600, spread=310, operators=400_000)
CPU_TILES_BF16 = Rates(product=2.9, native=24, sampled=62, gather=700, turn=2400, spread=300, operators=400_000)
CPU_SLOW_BF16 = Rates(product=80, native=40, sampled=65, gather=500, turn=1500, spread=1000)
CUDA = Rates(product=0.0029, native=1, sampled=0.27, gather=4, turn=2, spread=1, start=6000)
CUDA_WIDE = Rates(product=0.04, native=1, sampled=0.54, gather=8, turn=4, spread=1, start=6000)  # fp32 and float64
WITHOUT_TRITON = 10  # how many times as long the sampled plan is taken to need


def rates_for(weight: torch.Tensor) -> Rates:
    """The constants for weights of this dtype on this kind of device."""
    if weight.device.type != "cpu":
        rates = CUDA if weight.dtype in (torch.bfloat16, torch.float16) else CUDA_WIDE
        if triton_turn.installed() and weight.dtype in triton_turn.DTYPES:
            return rates
        return replace(rates, sampled=WITHOUT_TRITON * rates.sampled, turn=WITHOUT_TRITON * rates.turn)
    if weight.dtype in (torch.bfloat16, torch.float16):
        if slow_on_cpu(weight.dtype):
            return CPU_SLOW_BF16
        return CPU_TILES_BF16 if has_tiles() else CPU_BF16
    return CPU_FP32


def estimates(layout: Layout, weight: torch.Tensor) -> dict[str, float]:
    """Plan -> picoseconds a token; only plans that can run."""
    rates = rates_for(weight)
    return {plan: sum(count * getattr(rates, name) for name, count in parts.items()) for plan, parts in work(layout, weight).items()}


def work(layout: Layout, weight: torch.Tensor) -> dict[str, dict[str, int]]:
    """Plan -> what it does for a token: name of a constant of Rates -> how often; only plans that can run."""
    touched_rows, touched_columns = layout.rows_R.numel(), layout.cols_C.numel()
    kind = kind_of(weight)
    rows, moved_rows = _taken(touched_rows, layout.shape[0], kind)
    columns, moved_columns = _taken(touched_columns, layout.shape[1], kind)
    found = {
        "compact": {"product": rows * columns, "gather": moved_rows + moved_columns, "operators": 1},
        "sampled": {"sampled": layout.nnz, "turn": touched_rows + touched_columns, "start": 1},
        "dense": {"product": layout.shape[0] * columns, "gather": moved_columns, "operators": 1},
    }
    if native.fits(weight):
        found["native"] = {"native": layout.nnz, "spread": touched_rows + touched_columns}
    return found


def _taken(count: int, width: int, kind: str) -> tuple[int, int]:
    """How many rows or columns a product takes for `count` touched ones, and how many of them are gathered (cut.py)."""
    if kind == "cuda" and count >= WHOLE_ABOVE[kind] * width and width % VECTOR == 0:
        return width, 0
    return count, count


def choose(layout: Layout, weight: torch.Tensor) -> tuple[str, str]:
    """The cheapest plan's name and the reason, with the runner-up."""
    ranked = sorted(estimates(layout, weight).items(), key=lambda item: item[1])
    (name, cost), (second, other) = ranked[:2]
    rows, columns = layout.rows_R.numel(), layout.cols_C.numel()
    about = f"{layout.nnz} entries in {rows} rows x {columns} columns ({layout.touched_area:.1%} of the area)"
    return name, f"{about}: {cost / 1000:.1f} ns a token, {second} {other / 1000:.1f}"
