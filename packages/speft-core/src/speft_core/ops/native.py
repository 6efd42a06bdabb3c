"""The compiled plan for CPUs: native.c, built once with the machine's own C compiler when there is one; never required.

The library goes into SPEFT_CACHE (or `speft` in the user's cache folder) under a name that hashes its source, the compiler
and the processor. SPEFT_NATIVE=0 turns it off. Without a compiler, or when building fails, `reason()` says so and the other
plans serve.

Shape suffixes: O outputs, T tokens, R rows with an entry, C columns with an entry, K kept entries.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from .inputs import Inputs
from .layout import Layout
from .sampled import sampled_entries

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-ffp-contract=fast")
BUILD_SECONDS = 120
TOKENS = 64  # as in native.c
ABI = 3  # as in native.c
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Factor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("col", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("round", ctypes.c_int32),
    ]


class _Layout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "columns", "entries", "outputs", "inputs")] + [
        (name, ctypes.c_void_p) for name in ("row", "first", "column", "place")
    ]


def _cache_folder() -> Path:
    if os.environ.get("SPEFT_CACHE"):
        return Path(os.environ["SPEFT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "speft"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()


@functools.cache
def _openmp() -> list[str]:
    """PyTorch's own OpenMP runtime, so that both use one pool of threads; none found means one thread."""
    folder = Path(torch.__file__).parent
    for pattern in ("lib/libgomp*.so*", "../torch.libs/libgomp*.so*", "lib/libiomp5.so"):
        found = sorted(folder.glob(pattern))
        if found:
            return [str(found[0])]
    return []


def _build(compiler: str, target: Path) -> None:
    """Compile, then link against PyTorch's OpenMP; the library appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    openmp = _openmp()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, library = f"{folder}/native.o", f"{folder}/native.so"
        steps = [
            [compiler, *FLAGS, *(["-fopenmp"] if openmp else []), "-c", str(SOURCE), "-o", made],
            [compiler, "-shared", made, *openmp, "-o", library],
        ]
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=BUILD_SECONDS)
        os.replace(library, target)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not. Built at most once a process, and kept between processes."""
    if os.environ.get("SPEFT_NATIVE", "1") == "0":
        return None, "SPEFT_NATIVE=0"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler"
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=BUILD_SECONDS).stdout
        key = [SOURCE.read_bytes(), version, _processor().encode(), " ".join((*FLAGS, *_openmp())).encode()]
        name = f"native-{hashlib.blake2b(b'|'.join(key), digest_size=8).hexdigest()}.so"
        target = _cache_folder() / name
        if not target.is_file():
            try:
                _build(compiler, target)
            except OSError:  # the cache cannot be written
                target = Path(tempfile.mkdtemp(prefix="speft-")) / name
                _build(compiler, target)
        library = ctypes.CDLL(str(target))
        library.speft_scratch.restype = ctypes.c_int64
        if library.speft_abi() != ABI:  # native.c was changed while this process ran
            return None, "native.c is of another version than native.py"
        return library, ""
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"{compiler} cannot build it ({type(error).__name__})"


def reason() -> str:
    """Empty when the compiled plan can be used, else why it cannot."""
    return _load()[1]


def fits(weight: torch.Tensor) -> bool:
    """Whether the compiled code takes weights like this one (CPU, fp32 or bf16, 32-bit indices) and is there."""
    small = weight.numel() < 2**31
    return weight.device.type == "cpu" and weight.dtype in DTYPES and small and _load()[0] is not None


def _threads() -> int:
    return torch.get_num_threads() if _openmp() else 1


_local = threading.local()


def _scratch(size: int) -> torch.Tensor:
    """A buffer of this thread, kept between calls: fresh pages for every layer cost more than the sums."""
    kept: torch.Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _local.scratch = torch.empty(size, dtype=torch.uint8)
    return kept


def _factor(tensor_TI: torch.Tensor, rounded: torch.dtype) -> _Factor:
    row, col = tensor_TI.stride()
    return _Factor(tensor_TI.data_ptr(), row, col, DTYPES[tensor_TI.dtype], DTYPES.get(rounded, 0))


class Pattern:
    """A Layout as native.c reads it; keeps its int32 tensors alive."""

    def __init__(self, layout: Layout, columns_C: torch.Tensor, inputs: int) -> None:
        kept = (layout.rows_R, layout.first_R, columns_C, layout.col_of_K)
        self._tensors = [t.to("cpu", torch.int32).contiguous() for t in kept]
        counts = (layout.rows_R.numel(), columns_C.numel(), layout.nnz, layout.shape[0], inputs)
        self.struct = _Layout(*counts, *(t.data_ptr() for t in self._tensors))
        self.reference = ctypes.byref(self.struct)


def native_entries(inputs: Inputs, grad_TO: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The entries by blocked dot products, straight from the factors of the input: no gather, no dense product."""
    library = _load()[0]
    tokens = grad_TO.shape[0]
    if library is None or grad_TO.dtype not in DTYPES or any(f.dtype not in DTYPES for f, _ in inputs.factors):
        return sampled_entries(inputs, grad_TO, layout)
    out_K = torch.empty(layout.nnz, dtype=torch.float32)
    if layout.nnz == 0 or tokens == 0:
        return out_K.zero_()
    width = inputs.factors[0][0].shape[1]
    pattern = layout.derived(("native", inputs.key, width), lambda: Pattern(layout, inputs.places(layout), width))
    parts = max(1, min(_threads(), -(-tokens // TOKENS)))
    factors = (_Factor * len(inputs.factors))(*(_factor(f, d) for f, d in inputs.factors))
    scratch = _scratch(library.speft_scratch(pattern.reference, parts))
    library.speft_entries(
        pattern.reference,
        factors,
        len(factors),
        ctypes.byref(_factor(grad_TO, torch.float32)),
        ctypes.c_int64(tokens),
        parts,
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(out_K.data_ptr()),
    )
    return out_K


def writes(weight: torch.Tensor, indices_K: torch.Tensor, *others_K: torch.Tensor) -> bool:
    """Whether native_add and native_put take these: all on the CPU, contiguous, of a length; int32 indices; fp32 or bf16."""
    if indices_K.dtype != torch.int32 or not indices_K.is_contiguous() or not weight.is_contiguous() or not fits(weight):
        return False
    count = indices_K.numel()
    plain = (t.dtype in DTYPES and t.numel() == count and t.device.type == "cpu" and t.is_contiguous() for t in others_K)
    return indices_K.device.type == "cpu" and all(plain)


def native_add(
    weight: torch.Tensor,
    indices_K: torch.Tensor,
    values_K: torch.Tensor,
    base_K: torch.Tensor | None = None,
    held_K: torch.Tensor | None = None,
) -> None:
    """weight.view(-1)[indices] = base + values, the bits of writing.add_values. Without base, what the weight holds, which goes
    into `held_K` first. One pass over the entries; check with `writes` before."""
    library = _load()[0]
    assert library is not None and (base_K is None) != (held_K is None)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (weight, indices_K, base_K, held_K, values_K)]
    dtypes = (DTYPES[weight.dtype], DTYPES[values_K.dtype])
    library.speft_add(*pointers, ctypes.c_int64(indices_K.numel()), *dtypes, _threads())


def native_put(weight: torch.Tensor, indices_K: torch.Tensor, entries_K: torch.Tensor) -> None:
    """weight.view(-1)[indices] = entries, of the weight's dtype, bits as they are; check with `writes` before."""
    library = _load()[0]
    assert library is not None and entries_K.dtype == weight.dtype
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, indices_K, entries_K))
    library.speft_put(*pointers, ctypes.c_int64(indices_K.numel()), DTYPES[weight.dtype], _threads())


Change = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _packed(changes: Sequence[Change]) -> tuple[array[int], ctypes.c_void_p, ctypes.c_int64]:
    """`changes` as native.c's array of struct change: eight 64-bit words each."""
    words = array("q")
    for weight, indices_K, base_K, values_K, held_K in changes:
        words.extend(0 if t is None else t.data_ptr() for t in (weight, indices_K, base_K, values_K, held_K))
        words.extend((indices_K.numel(), DTYPES[weight.dtype], 0 if values_K is None else DTYPES[values_K.dtype]))
    return words, ctypes.c_void_p(words.buffer_info()[0]), ctypes.c_int64(len(changes))


def native_add_all(changes: Sequence[Change]) -> None:
    """native_add of many (weight, indices, base, values, held), side by side; check each with `writes` before."""
    library = _load()[0]
    assert library is not None
    words, start, count = _packed(changes)
    library.speft_add_all(start, count, _threads())
    del words  # held until here


def native_put_all(changes: Sequence[Change]) -> None:
    """native_put of many (weight, indices, entries, None, None), side by side; check each with `writes` before."""
    library = _load()[0]
    assert library is not None
    words, start, count = _packed(changes)
    library.speft_put_all(start, count, _threads())
    del words  # held until here
