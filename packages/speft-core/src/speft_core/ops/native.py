"""The compiled plan for CPUs: native.c, built once with the machine's own C compiler when there is one; never required.

The library goes into SPEFT_CACHE (or `speft` in the user's cache folder) under a name that hashes its sources, the compiler
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
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .inputs import Inputs
from .layout import Layout
from .recipes import Recipe
from .sampled import sampled_entries

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-ffp-contract=fast")
BUILD_SECONDS = 120
TOKENS = 64  # as in native.c
ABI = 6  # as in native.c
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
OTHER = -1  # a dtype that native.c does not read
SHARED_BYTES = 64 << 20  # most that a thread holds of an input for the layers that read it; beyond it each forms its own
FACTOR_BYTES = 40  # struct factor of native_turn.h: five 64-bit words
_P, _N = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "speft_scratch": [_P, _N],
    "speft_entries": [_P, _P, _N, _P, _N, _N, _P, _P, _P, _N],
    "speft_blocks": [_P, _P, _N, _P, _N, _N],
    **{f"speft_{what}": [_P, _N, _N] for what in ("take", "put", "add")},
}


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
        sources = sorted(SOURCE.parent.glob("native*.[ch]"))
        key = [*(source.read_bytes() for source in sources), version, _processor().encode(), " ".join((*FLAGS, *_openmp())).encode()]
        name = f"native-{hashlib.blake2b(b'|'.join(key), digest_size=8).hexdigest()}.so"
        target = _cache_folder() / name
        if not target.is_file():
            try:
                _build(compiler, target)
            except OSError:  # the cache cannot be written
                target = Path(tempfile.mkdtemp(prefix="speft-")) / name
                _build(compiler, target)
        library = ctypes.CDLL(str(target))
        for name, kinds in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = kinds, None if name == "speft_entries" else ctypes.c_int64
        if library.speft_abi() != ABI:  # native.c was changed while this process ran
            return None, "native.c is of another version than native.py"
        return library, ""
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"{compiler} cannot build it ({_first_error(error)})"


def _first_error(error: Exception) -> str:
    """The compiler's first line that names an error, what the loader said, or what kind of failure it was."""
    if type(error) is OSError:  # built, but it cannot be loaded: clang's OpenMP next to GNU's
        return str(error)
    said = getattr(error, "stderr", None) or b""
    lines = said.decode(errors="replace").splitlines()
    return next((line.strip() for line in lines if "error" in line.lower()), type(error).__name__)


def reason() -> str:
    """Empty when the compiled plan can be used, else why it cannot."""
    return _load()[1]


def fits(weight: torch.Tensor) -> bool:
    """Whether the compiled code takes weights like this one (CPU, fp32 or bf16, 32-bit indices) and is there."""
    return weight.is_cpu and weight.dtype in DTYPES and weight.numel() < 2**31 and _load()[0] is not None


def _threads() -> int:
    return torch.get_num_threads() if _openmp() else 1


_local = threading.local()


def _scratch(size: int) -> torch.Tensor:
    """A buffer of this thread, kept between calls: fresh pages for every layer cost more than the sums."""
    kept: torch.Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _local.scratch = torch.empty(size, dtype=torch.uint8)
    return kept


class Pattern:
    """A Layout as native.c reads it; keeps its int32 tensors alive."""

    def __init__(self, layout: Layout, columns_C: torch.Tensor, inputs: int, place_K: torch.Tensor | None = None) -> None:
        kept = (layout.rows_R, layout.first_R, columns_C, layout.col_of_K if place_K is None else place_K)
        self._tensors = [t.to(torch.int32).contiguous() for t in kept]
        counts = (layout.rows_R.numel(), columns_C.numel(), layout.nnz, layout.shape[0], inputs)
        self.struct = _Layout(*counts, *(t.data_ptr() for t in self._tensors))
        self.address = ctypes.addressof(self.struct)
        self.entries = layout.nnz
        self.scratch: dict[int, int] = {}  #: number of parts -> bytes
        self.sizes: dict[tuple[int, ...], int] = {}  #: what the blocks depend on -> their bytes
        self.shared: tuple[Layout, ...] = ()  #: the layouts whose columns are among its columns


def native_entries(inputs: Inputs, grad_y: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The entries by blocked dot products, straight from the factors of the input: no gather, no dense product.

    Plain code: it runs hundreds of times a step, each time with cold caches, where every call of a tensor's method shows.
    """
    library, recipe, (outputs, width) = _load()[0], inputs.recipe, layout.shape
    if not grad_y.is_contiguous():
        grad_y = grad_y.reshape(-1, outputs)
    row, col = (outputs, 1) if grad_y.is_contiguous() else grad_y.stride()
    words = [grad_y.data_ptr(), row, col, DTYPES.get(grad_y.dtype, OTHER), 0]  # struct factor of native_turn.h, as those below
    words += _words(inputs)
    words[-1] = DTYPES.get(inputs.given[-1][1], 0)  # each reader's own
    if recipe is None:
        width = inputs.given[0][0].shape[1]
    if library is None or OTHER in words[3::5]:
        return sampled_entries(inputs, grad_y, layout)
    packed, tokens = array("q", words), grad_y.numel() // max(1, outputs)
    at, count = packed.buffer_info()[0], len(words) // 5 - 1
    parts = max(1, min(_threads(), -(-tokens // TOKENS)))
    blocks, fill = 0, 1
    if recipe is not None and len(recipe.shared) > 1:
        pattern, made = pattern_of_all(layout, recipe.shared, width), (tokens, parts, words[3], words[-1], count)
        size = pattern.sizes.get(made)
        if size is None:
            size = pattern.sizes[made] = library.speft_blocks(pattern.address, at + FACTOR_BYTES, count, at, tokens, parts)
        if size <= SHARED_BYTES:
            blocks, fill = _blocks(size, recipe, made)
    if not blocks:
        pattern = layout.derived(("native", inputs.key, width), lambda: Pattern(layout, inputs.places(layout), width))
    out_K = torch.empty(pattern.entries, dtype=torch.float32)
    if parts not in pattern.scratch:
        pattern.scratch[parts] = library.speft_scratch(pattern.address, parts)
    scratch = _scratch(pattern.scratch[parts])
    library.speft_entries(
        pattern.address, at + FACTOR_BYTES, count, at, tokens, parts, scratch.data_ptr(), out_K.data_ptr(), blocks, fill
    )
    return out_K


def _words(inputs: Inputs) -> list[int]:
    """The factors as native.c reads them: where each begins, how far it is from a token to the next and from a column to the
    next, dtypes. Made once for all readers of a recipe, and without views of the usual shapes."""
    recipe = inputs.recipe
    if recipe is not None and recipe.words:
        return recipe.words
    words: list[int] = []
    shape, copied = None if recipe is None else recipe.shape, False
    for place, (factor, rounded) in enumerate(inputs.given):
        steps: Sequence[int] | None = None
        if shape is not None and factor.is_contiguous():
            steps = _steps(factor.shape, shape)
        if steps is None:
            row_by_row = inputs.factors[place][0]
            copied = copied or row_by_row.data_ptr() != factor.data_ptr()
            factor, steps = row_by_row, row_by_row.stride()
        words += factor.data_ptr(), *steps, DTYPES.get(factor.dtype, OTHER), DTYPES.get(rounded, 0)
    if recipe is not None and not copied:  # a copy lives as long as these inputs
        recipe.words = words
    return words


def _steps(own: torch.Size, shape: torch.Size) -> tuple[int, int] | None:
    """The two distances of a contiguous factor of size `own` that expands to `shape`, where that is plain to see."""
    if own == shape:
        return shape[-1], 1
    if own == shape[-1:]:
        return 0, 1
    return (1, 0) if own == (*shape[:-1], 1) else None


def pattern_of_all(layout: Layout, readers: Sequence[Layout], width: int) -> Pattern:
    """The layout among the columns that any of the readers of one input needs."""
    known: Pattern | None = layout.derived(("native", "shared", width), lambda: None)
    if known is None or known.shared != tuple(readers):  # layouts are equal to themselves alone
        union_U = torch.cat([reader.cols_C for reader in readers]).unique()
        place_K = torch.searchsorted(union_U, layout.cols_C).index_select(0, layout.col_of_K)
        known = layout._derived["native", "shared", width] = Pattern(layout, union_U, width, place_K)
        known.shared = tuple(readers)
    return known


def _blocks(size: int, recipe: Recipe, made: tuple[object, ...]) -> tuple[int, int]:
    """Where this thread holds the blocks of an input for all layers that read it, and whether they are to be made first.

    One input's at a time: backward comes to its readers one after the other. `made`: what else the blocks depend on.
    """
    kept: torch.Tensor | None = getattr(_local, "blocks", None)
    if kept is None or kept.numel() < size:
        kept = _local.blocks = torch.empty(size, dtype=torch.uint8)
        _local.owner = None
    owner: tuple[weakref.ref[Recipe], tuple[object, ...], int] | None = _local.owner
    if owner is not None and owner[0]() is recipe and owner[1] == made and owner[2] == len(recipe.shared):
        return kept.data_ptr(), 0
    _local.owner = (weakref.ref(recipe), made, len(recipe.shared))
    return kept.data_ptr(), 1


Change = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def writes(change: Change) -> bool:
    """Whether Changes takes (weight, indices_K, base_K, values_K or None): on the CPU, contiguous, of a length; int32 indices;
    fp32 or bf16, base in the weight's own."""
    weight, indices_K, base_K, values_K = change
    if indices_K.dtype != torch.int32 or base_K.dtype != weight.dtype or not weight.is_contiguous() or not fits(weight):
        return False
    count = indices_K.numel()  # plain code: an adapter has hundreds of tensors, and is put on in milliseconds
    if not (indices_K.is_cpu and base_K.is_cpu and base_K.numel() == count and indices_K.is_contiguous() and base_K.is_contiguous()):
        return False
    if values_K is None:
        return True
    return values_K.dtype in DTYPES and values_K.is_cpu and values_K.numel() == count and values_K.is_contiguous()


class Changes:
    """(weight, indices_K, base_K, values_K) of many tensors as native.c reads them; check each with `writes` before. No two of
    one weight. Keeps the tensors alive, and holds as long as no weight moves."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._tensors, self._words = list(changes), array("q")  # struct change of native.c: eight 64-bit words each
        for weight, indices_K, base_K, values_K in changes:
            added = (0, 0) if values_K is None else (values_K.data_ptr(), DTYPES[values_K.dtype])
            self._words.extend((weight.data_ptr(), indices_K.data_ptr(), base_K.data_ptr(), added[0]))
            self._words.extend((indices_K.numel(), weight.numel(), DTYPES[weight.dtype], added[1]))

    def run(self, what: str) -> None:
        """Side by side: "take" copies the weights' entries into base, "put" copies base into the weights, "add" writes
        base + values, with the bits of writing.add_values. IndexError for indices outside a weight: those are left out."""
        library = _load()[0]
        assert library is not None
        outside = getattr(library, f"speft_{what}")(self._words.buffer_info()[0], len(self._tensors), _threads())
        if outside:
            raise IndexError(f"{outside} indices lie outside their weights")
