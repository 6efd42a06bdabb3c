"""A checkpoint's 16-bit weights written anew in float32, which holds each of their values; a tensor at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from speft_core import UserError

from .checkpoint import INDEX, Checkpoint, read_header, write_index

NARROW = (torch.bfloat16, torch.float16)


def widen(folder: Path) -> None:
    """Rewrite the bf16 and fp16 tensors of the checkpoint in `folder` in float32; UserError when it is quantized."""
    checkpoint = Checkpoint(folder)
    if checkpoint.config.get("quantization_config"):
        raise UserError("--dtype float32 needs a base in plain floating point; this one is quantized")
    files: dict[str, list[str]] = {file.name: [] for file in checkpoint.files}
    for key, place in checkpoint.places.items():
        files[place.file.name].append(key)
    for name, keys in files.items():
        if any(checkpoint.places[key].dtype in NARROW for key in keys):
            _rewrite(checkpoint, folder / name, keys)
    if (folder / INDEX).is_file():
        write_index(folder, files)


def _rewrite(checkpoint: Checkpoint, file: Path, keys: list[str]) -> None:
    """A new file in the place of `file`: the largest dtypes first, as safetensors has them, so that every tensor is aligned."""
    old, _ = read_header(file)
    places = {key: checkpoint.places[key] for key in keys}
    sizes = {key: 4 if place.dtype in NARROW else place.dtype.itemsize for key, place in places.items()}
    order = sorted(keys, key=lambda key: (-sizes[key], places[key].start))
    header, end = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}, 0
    for key in order:
        start, end = end, end + places[key].nbytes // places[key].dtype.itemsize * sizes[key]
        dtype = "F32" if places[key].dtype in NARROW else old[key]["dtype"]
        header[key] = {"dtype": dtype, "shape": list(places[key].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    beside = file.with_name(file.name + ".wide")
    with beside.open("xb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for key in order:
            with checkpoint.tensor(key) as tensor:
                whole = tensor.to(torch.float32) if tensor.dtype in NARROW else tensor
                out.write(whole.reshape(-1).view(torch.uint8).numpy().data)
    os.replace(beside, file)
