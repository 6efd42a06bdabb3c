"""Work on one tensor after another, on as many threads as torch is told to use.

NumPy and torch let go of the interpreter in their loops, so plain threads do; many small operators on one tensor each keep
the cores busier than torch's own threads inside one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item], small: bool = False) -> list[Result]:
    """`[work(item) for item in items]`, side by side unless `small`; raises what the first item in order that failed raised.

    `work` must not rely on grad mode or other state of the calling thread.
    """
    todo = list(items)
    threads = 1 if small else min(torch.get_num_threads(), len(todo))
    if threads < 2:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(threads, thread_name_prefix="speft") as pool:
        started = [pool.submit(work, item) for item in todo]
        try:
            return [future.result() for future in started]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
