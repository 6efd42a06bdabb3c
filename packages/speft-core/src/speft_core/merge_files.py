"""Merging adapters that lie on disk, reading and writing one tensor at a time: memory does not grow with the adapters."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from . import gaps
from .adapter import SparseAdapter
from .adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, config_text, read_config, read_delta, read_frame, readable
from .delta import SparseDelta
from .errors import UserError
from .files import atomic_folder, atomic_write
from .merge import check_same_base, make_recipe, merged_config, merged_deltas, merged_dense, merged_print, source_names
from .merge_report import Row

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


class _Lazy(Mapping[str, SparseDelta]):
    """The deltas of an open file, read (and checked) when asked for. The last one is kept: a merge asks for it thrice."""

    def __init__(self, folder: Path, file: Any, listed: Mapping[str, Any], config: AdapterConfig) -> None:
        self._folder, self._file, self._listed, self._config = folder, file, listed, config
        self._present = set(file.keys())
        self._last: tuple[str, SparseDelta] | None = None

    def __getitem__(self, name: str) -> SparseDelta:
        if name not in self._listed:
            raise KeyError(name)  # what Mapping.get expects; below, a KeyError means a damaged file
        if self._last is None or self._last[0] != name:
            self._last = None  # let the old one go first
            with readable(self._folder):
                delta = read_delta(self._file, self._present, name, self._listed[name], self._config)
            self._last = (name, delta)
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self._listed

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


class AdapterFile:
    """An adapter on disk whose sparse tensors are read one at a time. What `merge` asks of a source.

    UserError for anything missing, damaged or hostile, when it is opened or when the tensor concerned is read.
    """

    def __init__(self, folder: str | Path, stack: ExitStack) -> None:
        folder = Path(folder)
        with readable(folder):
            file = stack.enter_context(safe_open(str(folder / WEIGHTS_FILE), framework="pt"))
            self.config, self.dense, self.fingerprint = read_frame(file, read_config(folder / CONFIG_FILE))
            self.deltas = _Lazy(folder, file, self.fingerprint, self.config)
            SparseAdapter({}, self.dense).check()


class TensorWriter:
    """A safetensors file written a tensor at a time: contents go to a spool file, the header is put in front at the end."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._at = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor (contiguous, on the CPU)."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        size = self._spool.write(data)
        kind = SAFETENSORS_NAMES[tensor.dtype]
        self._header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [self._at, self._at + size]}
        self._at += size

    def finish(self, path: Path) -> None:
        """Write the file."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._spool.seek(0)
        with path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(self._spool, out, 1 << 20)


def merge_folders(
    folders: Sequence[str | Path],
    out: str | Path,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    check_base: bool = True,
    keep_dense: bool = True,
    replace: bool = False,
) -> list[Row]:
    """`merge` for adapters on disk, into the new folder `out`; same options, same result, memory O(one tensor).

    Returns what was measured, tensor by tensor. `keep_dense`: whether dense tensors that agree go along.
    `replace`: whether an existing `out` gives way.
    """
    recipe = make_recipe(len(folders), method, weights, density, seed, dtype)
    names = source_names(len(folders), [Path(f).name for f in folders] if names is None else names)
    rows: list[Row] = []
    listed: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        sources = [AdapterFile(folder, stack) for folder in folders]
        if check_base:
            check_same_base(sources, names)
        try:
            folder = stack.enter_context(atomic_folder(out, replace=replace))
        except FileExistsError:
            raise UserError(f"{out} exists already; name a new folder or ask to replace it") from None
        writer = TensorWriter(stack.enter_context(tempfile.TemporaryFile(dir=folder)))
        for name, merged, row in merged_deltas(sources, recipe):
            rows.append(row)
            writer.add(f"{name}.values", merged.values_K)
            writer.add(f"{name}.gaps", gaps.encode(merged.indices_K))
            prints = {k: v for k, v in merged_print(name, merged, sources).items() if k != "shape"}
            listed[name] = {"shape": list(merged.shape), **prints}
        dense, apart = merged_dense(sources) if keep_dense else ({}, [])
        for name, tensor in dense.items():
            if name in listed:
                raise UserError(f"{name} is sparse in one adapter and dense in another")
            writer.add(f"dense.{name}", tensor)
        writer.finish(folder / WEIGHTS_FILE)
        config = merged_config(sources, recipe, names, rows, apart)
        atomic_write(folder / CONFIG_FILE, config_text(config, sum(r.merged for r in rows), listed))
    return rows
