"""`speft-train doctor`: is this machine ready for a run, and what to do where it is not. A table of checks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from speft_core.errors import UserError

Found = tuple[str, str, str]  # state, what was found, what to do
OK, NOTE, BAD = "ok", "note", "bad"
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "omegaconf", "datasets", "peft", "speft-core", "speft-train")
GB = 1e9
LEAST_DISK, LEAST_MEMORY = 5.0, 2.0  # GB: checkpoints and the adapter of a 7B run; imports and a small model


def python() -> Found:
    """The interpreter."""
    good = sys.version_info >= (3, 10)
    return (
        OK if good else BAD,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "Python 3.10 or newer",
    )


def packages() -> Found:
    """Versions of what a run imports."""
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return BAD if missing else OK, ", ".join(found), f"pip install {' '.join(missing)}" if missing else ""


def deepspeed() -> Found:
    """DeepSpeed, which only runs on several processes need."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return NOTE, "not installed", "pip install deepspeed, for runs on several GPUs"
    launcher = shutil.which("deepspeed") or (Path(sys.executable).parent / "deepspeed").is_file()
    return (OK, version, "") if launcher else (NOTE, f"{version}, no launcher on PATH", "activate the environment")


def compiler() -> Found:
    """A C compiler and ninja: for the native kernel, and for DeepSpeed's compiled operators."""
    name = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    ninja = shutil.which("ninja") or (Path(sys.executable).parent / "ninja").is_file()
    if name is None:
        return NOTE, "none", "install gcc: the native kernel falls back to PyTorch's, and offload_optimizer cannot be built"
    return (
        OK,
        f"{name}, {'ninja' if ninja else 'no ninja'}",
        "" if ninja else "pip install ninja, for deepspeed.offload_optimizer",
    )


def kernel() -> Found:
    """The compiled backward for CPUs."""
    from speft_core.ops import native

    why = native.reason()
    return (NOTE, why, "set CC to a C compiler; without it backward runs on PyTorch's products") if why else (OK, "built", "")


def gpus() -> Found:
    """Accelerators and their free memory."""
    import torch

    if not torch.cuda.is_available():
        return NOTE, "none; runs use the CPU", "" if shutil.which("nvidia-smi") is None else "install a CUDA build of torch"
    rows = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        rows.append(f"{torch.cuda.get_device_name(number)} {free / GB:.0f} of {total / GB:.0f} GB free")
    return OK, "; ".join(rows), ""


def backend() -> Found:
    """What processes talk over."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return BAD, "torch.distributed is missing", "install a build of torch with distributed"
    if torch.cuda.is_available():
        good = dist.is_nccl_available()
        return (
            (OK, f"nccl {torch.cuda.nccl.version()}", "")
            if good
            else (BAD, "no nccl", "install a CUDA build of torch for Linux")
        )
    return (OK, "gloo", "") if dist.is_gloo_available() else (BAD, "no gloo", "install a build of torch with gloo")


def low_precision() -> Found:
    """Whether bfloat16 products are fast here."""
    import torch

    from speft_core.ops.matmul import slow_on_cpu

    if torch.cuda.is_available():
        good = torch.cuda.is_bf16_supported()
        return (OK, "on the GPU", "") if good else (NOTE, "not on this GPU", "model.dtype=float32 or float16")
    slow = slow_on_cpu(torch.bfloat16)
    return (NOTE, "this CPU has no such products", "model.dtype=float32") if slow else (OK, "on the CPU", "")


def memory() -> Found:
    """Free memory of the machine."""
    from speft_core.saliency.memory import free_host_memory

    free = free_host_memory() / GB
    return OK if free >= LEAST_MEMORY else BAD, f"{free:.1f} GB free", "" if free >= LEAST_MEMORY else "end other programs"


def disk() -> Found:
    """Free space where runs and models go."""
    places = {"here": Path.cwd(), "models": Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()}
    free = {}
    for name, place in places.items():
        while not place.exists():
            place = place.parent
        free[name] = shutil.disk_usage(place).free / GB
    low = [name for name, amount in free.items() if amount < LEAST_DISK]
    words = ", ".join(f"{amount:.0f} GB {name}" for name, amount in free.items())
    return (BAD, words, "free some; HF_HOME moves the models, output_dir a run") if low else (OK, words, "")


CHECKS: dict[str, Callable[[], Found]] = {
    "Python": python, "packages": packages, "DeepSpeed": deepspeed, "C compiler": compiler, "native kernel": kernel, "GPUs": gpus,
    "processes": backend, "bfloat16": low_precision, "memory": memory, "disk": disk,
}  # fmt: skip


def show(console: Console) -> None:
    """Print every check; UserError at the end when one of them would stop a run."""
    table = Table(title="speft-train doctor", title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading)
    bad = []
    for name, check in CHECKS.items():
        state, found, advice = check()
        if state == BAD:
            bad.append(name)
        table.add_row(name, state, escape(found), escape(advice if state != OK or name == "C compiler" else ""))
    console.print(table)
    if bad:
        raise UserError(f"not ready for a run: {', '.join(bad)}; the last column of the table says what to do")
