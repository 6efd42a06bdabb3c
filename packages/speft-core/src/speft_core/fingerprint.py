"""What an adapter remembers of its base, so that it is never put onto another one.

Per tensor: its shape; `base`, a hash of the base's entries at the adapter's indices in the base's dtype; `base_bf16`, the
same hash after rounding to bf16 (left out when the base is bf16 itself); `sample`, a hash of 64 evenly spaced entries rounded
to bf16, which does not depend on the mask, so that adapters of one base can be told to belong together.

A model loaded in the adapter's own base dtype must agree with `base`. In another dtype it must agree with `base_bf16`: an fp32
copy of a bf16 checkpoint and a bf16 copy of an fp32 checkpoint both do.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .delta import SparseDelta
from .errors import UserError
from .targets import parameter_shape
from .writing import flat_view, gather

SAMPLES = 64


def entries_hash(entries_K: torch.Tensor) -> str:
    """16 hex digits over the bytes of `entries_K`."""
    return hashlib.blake2b(entries_K.contiguous().cpu().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def sample_hash(weight: torch.Tensor) -> str:
    """Hash of up to 64 evenly spaced entries of `weight`, rounded to bf16."""
    flat = flat_view(weight)
    count = min(SAMPLES, flat.numel())
    positions = torch.arange(count, device=flat.device) * max(1, flat.numel()) // max(1, count)
    return entries_hash(flat[positions].to(torch.bfloat16))


def fingerprint(weight: torch.Tensor, indices_K: torch.Tensor, base_K: torch.Tensor | None = None) -> dict[str, Any]:
    """The record of one tensor, taken before anything is written into `weight`; `base_K` saves a gather when at hand."""
    base_K = gather(weight, indices_K) if base_K is None else base_K
    record: dict[str, Any] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    record["base"] = entries_hash(base_K)
    record["sample"] = sample_hash(weight)
    if weight.dtype != torch.bfloat16:
        record["base_bf16"] = entries_hash(base_K.to(torch.bfloat16))
    return record


def check_fingerprint(name: str, weight: torch.Tensor, delta: SparseDelta, record: dict[str, Any] | None, base: str) -> None:
    """Raise UserError unless `weight` is the tensor that `delta` was made for; `base` names that model in the message."""
    if parameter_shape(weight) != delta.shape:
        shapes = f"{parameter_shape(weight)}, the adapter wants {delta.shape}"
        raise UserError(f"this adapter is for another base ({base}): {name} has shape {shapes}")
    if not record or "base" not in record:
        return  # made by hand or merged: nothing but the shape is known
    base_K = gather(weight, delta.indices_K.to(weight.device))
    if record.get("dtype") == str(weight.dtype).removeprefix("torch."):
        same = entries_hash(base_K) == record["base"]
    else:
        same = entries_hash(base_K.to(torch.bfloat16)) == record.get("base_bf16", record["base"])
    if not same:
        raise UserError(f"this adapter is for another base ({base}): {name} has other values than the one it was trained on")
