"""Plain Transformers checkpoints in safetensors, read and changed a tensor at a time.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speft_core import UserError

HEADER_LIMIT = 100 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LM_HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# How a file may call what the model calls by the second name: Transformers renames it on load (BERT, GPT-NeoX).
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"), ("embed_out.weight", LM_HEAD))


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are."""

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin; UserError when it cannot be one."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise UserError(f"{file} is no safetensors file")
        try:
            header = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            raise UserError(f"{file} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} is no safetensors file: its header is not an object")
    return header, 8 + length


def places(file: Path) -> dict[str, Place]:
    """The tensors of one safetensors file, every offset checked against the file's length."""
    header, base = read_header(file)
    room, found = file.stat().st_size - base, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            good = 0 <= start <= end <= room and end - start == math.prod(shape) * dtype.itemsize and min(shape, default=0) >= 0
        except (KeyError, TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise UserError(f"{file}: the entry of {name!r} cannot be, or has a dtype that is not known")
        found[name] = Place(file, base + start, end - start, dtype, shape)
    return found


def weight_files(present: Iterable[str], index: bytes | None, where: str) -> list[str]:
    """Which of the .safetensors files at `where` are the checkpoint, as Transformers sees it.

    Those that the index lists; without an index `model.safetensors` alone, beside which others (Mistral's `consolidated`, say) are
    copies in another layout; without either, all. UserError for an index that cannot be read or lists what is not present.
    """
    files = sorted(present)
    if index is None:
        return [SINGLE] if SINGLE in files else files
    try:
        listed = set(json.loads(index)["weight_map"].values())
        readable = all(isinstance(name, str) for name in listed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        readable = False
    if not readable:
        raise UserError(f"{where}/{INDEX} is no readable index")
    if missing := listed - set(files):
        raise UserError(f"{where}: {sorted(missing)[0]} is listed in the index and missing")
    return [f for f in files if f in listed]


class Checkpoint:
    """All tensors of a folder, by name, without reading any."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        present = sorted(f.name for f in self.folder.glob("*.safetensors"))
        content = index.read_bytes() if index.is_file() else None
        files = [self.folder / name for name in weight_files(present, content, str(self.folder))]
        if not files:
            raise UserError(f"{self.folder} holds no .safetensors checkpoint; pickled weights are not read")
        self.files = files
        self.places: dict[str, Place] = {}
        for file in files:
            self.places.update(places(file))
        self.config: dict[str, Any] = {}
        if (self.folder / "config.json").is_file():
            try:
                loaded = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                raise UserError(f"{self.folder}/config.json is not readable JSON") from None
            self.config = loaded if isinstance(loaded, dict) else {}

    def keys_of(self, parameter: str) -> list[str]:
        """The tensors that a model's parameter is stored as: one, or both of a tied pair, or none.

        A checkpoint may have the model's prefix where the class has none, or the other way round; tied embeddings and head are
        one parameter.
        """
        found = self.stored(parameter)
        if found in self.tied or (found is None and parameter.endswith((LM_HEAD, *EMBEDDINGS))):
            return list(self.tied)
        return [found] if found else []

    @cached_property
    def tied(self) -> tuple[str, ...]:
        """The embeddings and the head, as far as they are stored, where the two are one parameter; else nothing. As it was when
        first asked: before anything was changed.

        A stored head of its own makes them two, whatever the configuration says, as Transformers has it. Where that is silent, its
        class may tie them or not: they are one if a stored head is the embeddings.
        """
        embeddings = [k for k in self.places if k.endswith(EMBEDDINGS)]
        heads = [k for k in self.places if k.endswith(LM_HEAD)]
        told = self.config.get("tie_word_embeddings")
        tied = bool(heads) if told is None else bool(told)
        return (*embeddings, *heads) if tied and len(embeddings) == 1 and all(map(self.is_tied_copy, heads)) else ()

    def is_tied_copy(self, head: str) -> bool:
        """Whether a stored head is the embeddings once more, bit for bit."""
        embeddings = [k for k in self.places if k.endswith(EMBEDDINGS)]
        if len(embeddings) != 1:
            return False
        with self.tensor(head) as x, self.tensor(embeddings[0]) as y:
            return torch.equal(x, y)

    def stored(self, parameter: str) -> str | None:
        """The tensor of that name, with or without the model's prefix, in today's or an old spelling."""
        old = [parameter.removesuffix(new) + old for old, new in OLD_NAMES if parameter.endswith(new)]
        return next((found for name in (parameter, *old) if (found := self._stored(name))), None)

    def _stored(self, name: str) -> str | None:
        if name in self.places:
            return name
        without = name.partition(".")[2]
        if without in self.places:
            return without
        longer = [k for k in self.places if k.endswith("." + name) and k.count(".") == name.count(".") + 1]
        return longer[0] if len(longer) == 1 else None

    @contextmanager
    def tensor(self, key: str, write: bool = False) -> Iterator[torch.Tensor]:
        """The tensor, mapped from its file; with `write`, changes go to the file."""
        place = self.places[key]
        if place.nbytes == 0:
            yield torch.empty(place.shape, dtype=place.dtype)
            return
        mode: Any = "r+" if write else "c"
        mapped = np.memmap(place.file, dtype=np.uint8, mode=mode, offset=place.start, shape=(place.nbytes,))
        try:
            yield _as_tensor(mapped, place)
            if write:
                mapped.flush()
        finally:
            del mapped


def _as_tensor(mapped: np.ndarray, place: Place) -> torch.Tensor:
    flat = torch.from_numpy(mapped)
    if place.start % place.dtype.itemsize and flat.data_ptr() % place.dtype.itemsize:
        raise UserError(
            f"{place.file}: a tensor is not aligned in its file; save the checkpoint again with safetensors 0.4 or later"
        )
    return flat.view(place.dtype).view(place.shape)


def write_index(folder: Path, files: Mapping[str, list[str]]) -> None:
    """`model.safetensors.index.json` for tensors by file."""
    total = sum(p.nbytes for file in files for p in places(folder / file).values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
