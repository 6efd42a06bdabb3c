"""What an adapter remembers of its base, so that it is never put onto another one.

Per tensor: its shape; `base_<dtype>`, a hash of the base's entries at the adapter's indices in the base's dtype;
`base_bfloat16` and `base_float16`, the same after rounding to these; `sample` and `sample_float16`, hashes of 64 evenly spaced
entries rounded to bf16 and fp16, which do not depend on the mask, so that adapters of one base can be told to belong together,
and merged ones be checked.

A model in a dtype that the record has must agree with that dtype's hash, in any other with that of bf16 or of fp16: a wide copy of
a 16-bit checkpoint and 16-bit copies of a wide one do. What was rounded to one 16-bit dtype says too little of the other: such
copies are refused. Hashes are 48 bits, against mix-ups, not attackers.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import torch

from .delta import SparseDelta
from .errors import UserError
from .targets import parameter_shape
from .writing import flat_view, gather

SAMPLES = 64
_SHORT = {torch.bfloat16: "sample", torch.float16: "sample_float16"}


def entries_hash(entries_K: torch.Tensor) -> str:
    """8 characters (base 64) over the bytes of `entries_K`."""
    raw_K = entries_K.contiguous().cpu().view(torch.uint8).numpy()
    return base64.b64encode(hashlib.blake2b(raw_K.data, digest_size=6).digest()).decode()


def sample_hash(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> str:
    """Hash of up to 64 evenly spaced entries of `weight`, rounded to bf16 or another dtype."""
    flat = flat_view(weight)
    count = min(SAMPLES, flat.numel())
    positions = torch.arange(count, device=flat.device) * max(1, flat.numel()) // max(1, count)
    return entries_hash(flat[positions].to(dtype))


def _key(dtype: torch.dtype) -> str:
    return "base_" + str(dtype).removeprefix("torch.")


def fingerprint(weight: torch.Tensor, indices_K: torch.Tensor) -> dict[str, Any]:
    """The record of one tensor, taken before anything is written into `weight`."""
    base_K = gather(weight, indices_K)
    record: dict[str, Any] = {"shape": list(weight.shape)} | {key: sample_hash(weight, dtype) for dtype, key in _SHORT.items()}
    for dtype in dict.fromkeys((weight.dtype, *_SHORT)):
        record[_key(dtype)] = entries_hash(base_K.to(dtype))
    return record


def _compared_in(record: dict[str, Any], dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes in one of which a weight of `dtype` must agree with the record's hash of entries; none where it has no hash."""
    return [dtype] if _key(dtype) in record else [d for d in _SHORT if _key(d) in record]


def covers_entries(record: dict[str, Any] | None, dtype: torch.dtype) -> bool:
    """Whether the check of a weight of `dtype` depends on its entries at the adapter's indices alone, and on all of them."""
    return bool(_compared_in(record or {}, dtype))


def same_sample(one: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether two records are of one base by the samples that both have; None when they share none."""
    shared = [key for key in _SHORT.values() if key in one and key in other]
    return any(one[key] == other[key] for key in shared) if shared else None


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype, shape and device and hold the same bits (-0.0 is not 0.0, a NaN is itself)."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def check_fingerprint(
    name: str, weight: torch.Tensor, delta: SparseDelta, record: dict[str, Any] | None, base: str, base_K: torch.Tensor
) -> None:
    """Raise UserError unless `weight` is the tensor that `delta` was made for; `base` names that model in the message.

    `base_K`: the weight's entries at the delta's indices. A delta without a record (made by hand) is known by its shape alone, a
    merged one by its shape and sample.
    """
    check_shape(name, weight, delta.shape, base)
    record = record or {}
    dtypes = _compared_in(record, weight.dtype)
    if dtypes:
        same: bool | None = any(entries_hash(base_K.to(dtype)) == record[_key(dtype)] for dtype in dtypes)
    else:
        same = same_sample(record, {key: sample_hash(weight, dtype) for dtype, key in _SHORT.items()})
    if same is False:
        of = f"; if it is the same model rounded to {weight.dtype}, load it in the dtype that the adapter was trained in"
        hint = of if weight.dtype in _SHORT else ""
        raise UserError(f"this adapter is for another base ({base}): {name} has other values than the one it was trained on{hint}")


def check_shape(name: str, weight: torch.Tensor, shape: tuple[int, ...], base: str) -> None:
    """Raise UserError unless `weight` has `shape`, that of the tensor the adapter was made for."""
    if parameter_shape(weight) != shape:
        shapes = f"{parameter_shape(weight)}, the adapter wants {shape}"
        raise UserError(f"this adapter is for another base ({base}): {name} has shape {shapes}")
