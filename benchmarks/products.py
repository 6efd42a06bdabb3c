"""A linear layer's products in every form that `ops/matmul.py` chooses from: which one this CPU is faster at.

    python benchmarks/products.py --tokens 1024 --rounds 15

The input gradient in bf16, against the same formed in fp32 and rounded; in fp32 by PyTorch's own product (MKL's), against oneDNN's.
`ops/matmul.py` chooses by the kind of CPU, so that a run's bits do not depend on a stopwatch; this shows whether it chose well. Then
input gradient and forward in bf16 in pieces of tokens, and whether the bits are the same; with AMX `ops/pieces.py` chooses on the clock
among those whose bits are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import machine

from speft_core.ops import pieces
from speft_core.ops.matmul import has_onednn, has_tiles, onednn_is_faster, onednn_product, wider_is_faster

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048))


def milliseconds(forms: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Median of each form, timed in turn after a round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            if number:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if not has_onednn():
        parser.error("this PyTorch is built without oneDNN, so there is nothing to choose between")
    torch.set_num_threads(asked.threads)
    print(machine(asked.threads))
    print(f"chosen here: in bf16 {'fp32, rounded' if wider_is_faster(torch.bfloat16) else 'bf16'}, in fp32 ", end="")
    print("oneDNN's" if onednn_is_faster() else "PyTorch's own")
    print("layer         bf16 ms   fp32, rounded ms   ratio   fp32 ms   oneDNN's ms   ratio")
    for rows, columns in SHAPES:
        grad_TO, weight_OI = torch.randn(asked.tokens, rows), torch.randn(rows, columns)
        halves = (grad_TO.bfloat16(), weight_OI.bfloat16())
        found = milliseconds(
            {
                "bf16": lambda g=halves[0], w=halves[1]: g @ w,
                "rounded": lambda g=halves[0], w=halves[1]: (g.float() @ w.float()).bfloat16(),
                "fp32": lambda g=grad_TO, w=weight_OI: g @ w,
                "onednn": lambda g=grad_TO, w=weight_OI: onednn_product(g, w),
            },
            asked.rounds,
        )
        first = f"{found['bf16']:8.2f} {found['rounded']:18.2f} {found['rounded'] / found['bf16']:7.2f}"
        print(f"{rows:>5} x {columns:<5} {first} {found['fp32']:9.2f} {found['onednn']:13.2f} {found['onednn'] / found['fp32']:7.2f}")
    print(f"\nbf16 in pieces of at most {pieces.PIECE_TOKENS} tokens{'' if has_tiles() else ' (not used here, without AMX)'}")
    print("layer         input gradient   in pieces   ratio   same bits   forward   in pieces   ratio   same bits")
    for rows, columns in SHAPES:
        grad_TO, x_TI = torch.randn(asked.tokens, rows).bfloat16(), torch.randn(asked.tokens, columns).bfloat16()
        weight_OI = torch.randn(rows, columns).bfloat16()
        cells = []
        for left, right in ((grad_TO, weight_OI), (x_TI, weight_OI.t())):
            forms = {"whole": lambda a=left, b=right: a @ b, "pieces": lambda a=left, b=right: pieces.in_pieces(a, b)}
            found = milliseconds(forms, asked.rounds)
            same = "yes" if torch.equal(left @ right, pieces.in_pieces(left, right)) else "no"
            cells.append(f"{found['whole']:9.2f} {found['pieces']:11.2f} {found['pieces'] / found['whole']:7.2f} {same:>11}")
        print(f"{rows:>5} x {columns:<5}      {'  '.join(cells)}")


if __name__ == "__main__":
    main()
