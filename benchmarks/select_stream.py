"""The k-th largest of a stream of synthetic fp32 scores, chunk by chunk: time, peak memory, and a check that it is exact.

    python benchmarks/select_stream.py --count 2000000000 --density 0.005

The chunks are made anew from their number in each of the passes, so that no more than one exists. The check counts, in one
more pass with NumPy alone, how many scores lie above the value found and how many equal it. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch

from speft_core.select import kth_largest, select_topk

PART = 1 << 22  # scores made at a time, 16 MB


def stream(count: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Parts of `count` scores: a product of two uniform numbers, heavy at 0 as saliency is, with many ties."""
    for number in range(-(-count // PART)):
        generator = np.random.Generator(np.random.SFC64([seed, number]))
        scores_N = generator.random(min(PART, count - number * PART), dtype=np.float32)
        yield "scores", torch.from_numpy(scores_N * scores_N[::-1])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2_000_000_000, help="scores in the stream")
    parser.add_argument("--density", type=float, default=0.005, help="share kept, k = density x count")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--indices", action="store_true", help="collect the k indices too (4 or 8 bytes each)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    k = max(1, round(arguments.count * arguments.density))
    started = time.perf_counter()
    value, ties, sizes = kth_largest(lambda: stream(arguments.count, 0), k)
    result = {"count": sizes["scores"], "k": k, "kth": value, "ties_kept": ties}
    result["kth_seconds"] = round(time.perf_counter() - started, 1)
    if arguments.indices:
        started = time.perf_counter()
        kept = select_topk(lambda: stream(arguments.count, 0), k)["scores"].numel()
        result |= {"kept": kept, "select_seconds": round(time.perf_counter() - started, 1)}
    result["peak_megabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    above = equal = 0
    for _, part in stream(arguments.count, 0):
        above += int(np.count_nonzero(part.numpy() > np.float32(value)))
        equal += int(np.count_nonzero(part.numpy() == np.float32(value)))
    result["exact"] = above < k <= above + equal and above + ties == k
    print(json.dumps(result))


if __name__ == "__main__":
    main()
