"""Peak memory of a part of a run, and amounts of memory in words."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{prefix}i": 1024**power for power, prefix in enumerate("kMGT", start=1)}


def bytes_of(amount: int | str | None) -> int | None:
    """512, "512MiB" or "1.5 GB" as a number of bytes, at least 1; None stays None."""
    if amount is None or isinstance(amount, int):
        return amount
    found = re.fullmatch(r"([\d.]+) ?([kMGT]i?|)B", amount)
    assert found is not None, "the config's rules let no other text pass"
    return max(1, int(float(found[1]) * UNITS[found[2]]))


def _cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def reset_peak() -> None:
    """Start measuring anew, where the system allows it (CUDA, Linux)."""
    if _cuda():
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Highest use since `reset_peak`: memory allocated on the GPU, or else this process's resident memory."""
    if _cuda():
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_bytes() -> int:
    """Memory of this process's GPU, or of the machine."""
    if _cuda():
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation failed."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
