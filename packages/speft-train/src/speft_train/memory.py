"""Peak memory of a part of a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path


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
