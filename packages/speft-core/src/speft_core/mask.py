"""How many scalars to train (Budget) and which (SparsityMask)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import gaps
from .delta import check_indices
from .errors import UserError
from .files import atomic_write, check_readable
from .targets import base_parameters, head_and_embedding_names, parameter_shape

DENSITY_OF = ("model", "targets", "body")
MASK_FORMAT_VERSION = 1
METADATA_KEY = "speft_mask"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many scalars k are trained: exactly one of `k`, `density` or `like_lora_r` is given.

    k: the count itself.
    density: a share in (0, 1] of what `of` names: all parameters of the model, the targets, or the body (all parameters
        but embeddings and head).
    like_lora_r: as many as LoRA of this rank would train on the same matrices, the sum of r x (rows + columns).
    """

    k: int | None = None
    density: float | None = None
    of: str = "model"
    like_lora_r: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("k", "density", "like_lora_r") if getattr(self, n) is not None]
        if len(given) != 1:
            raise UserError(f"a budget takes exactly one of k, density and like_lora_r, got {', '.join(given) or 'none'}")
        for name in ("k", "like_lora_r"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"budget.{name} must be a whole number of at least 1, got {value!r}")
        if self.density is not None and not (isinstance(self.density, (int, float)) and 0 < self.density <= 1):
            raise UserError(f"budget.density must lie in (0, 1], got {self.density!r}")
        if self.of not in DENSITY_OF:
            raise UserError(f"budget.of must be one of {', '.join(DENSITY_OF)}, got {self.of!r}")

    def resolve(self, model: nn.Module, target_names: Iterable[str]) -> int:
        """The count k for these targets of `model` (the meta device will do); UserError when the targets hold fewer."""
        shapes = {n: parameter_shape(p) for n, p in base_parameters(model).items()}
        target_names = list(target_names)
        pool = sum(math.prod(shapes[n]) for n in target_names)
        if self.k is not None:
            k = self.k
        elif self.like_lora_r is not None:
            k = sum(self.like_lora_r * sum(shapes[n]) for n in target_names if len(shapes[n]) == 2)
            if k == 0:
                raise UserError("budget.like_lora_r counts matrices, and the targets hold none; give k or density")
        else:
            assert self.density is not None
            outside = head_and_embedding_names(model) if self.of == "body" else set()
            whole = pool if self.of == "targets" else sum(math.prod(s) for n, s in shapes.items() if n not in outside)
            k = round(self.density * whole)
            if k == 0:
                raise UserError(f"budget.density {self.density} of {whole:,} parameters keeps none; raise it")
        if k > pool:
            raise UserError(f"the budget must fit the targets: k = {k:,}, but {len(target_names)} targets hold {pool:,}")
        return k


@dataclass(frozen=True, eq=False)
class SparsityMask:
    """Which scalars are trained.

    indices: parameter name -> sorted unique flat indices; kept as int32 (int64 for tensors of 2**31 elements and more), contiguous.
    shapes: parameter name -> shape of the whole parameter.
    made: how the mask came about (metric, scope, seed, budget, targets, ...); plain JSON values.
    """

    indices: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.indices) != set(self.shapes):
            odd = sorted(set(self.indices) ^ set(self.shapes))[0]
            raise UserError(f"a mask needs indices and a shape for each name, {odd!r} has only one of them")
        for name, indices_K in self.indices.items():
            check_indices(name, indices_K, self.shapes[name])
        # One form, as in files: compiled code reads no other, and hashes of a mask must not tell one from another.
        kept = {n: i.to(gaps.index_dtype(math.prod(self.shapes[n]))).contiguous() for n, i in self.indices.items()}
        object.__setattr__(self, "indices", kept)

    @property
    def names(self) -> list[str]:
        """The parameters of the mask, in its order."""
        return list(self.indices)

    @property
    def nnz(self) -> int:
        """How many scalars are kept in all."""
        return sum(i.numel() for i in self.indices.values())

    @property
    def numel(self) -> int:
        """How many scalars the masked tensors hold in all."""
        return sum(math.prod(s) for s in self.shapes.values())

    def densities(self) -> dict[str, float]:
        """Share kept of each tensor."""
        return {n: i.numel() / max(1, math.prod(self.shapes[n])) for n, i in self.indices.items()}

    def __eq__(self, other: object) -> bool:
        """Same names, shapes and indices; how they were made and the order of the tensors do not count."""
        if not isinstance(other, SparsityMask):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(i, other.indices[n]) for n, i in self.indices.items())

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def check_model(self, model: nn.Module) -> None:
        """Raise UserError naming the first tensor of the mask that `model` lacks or has in another shape."""
        parameters = base_parameters(model)
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise UserError(f"the mask does not fit the model: the model has no parameter {name!r}")
            found = parameter_shape(parameters[name])
            if found != tuple(shape):
                raise UserError(f"the mask does not fit the model: {name} has shape {found}, the mask wants {tuple(shape)}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `<name>.gaps` per tensor, shapes and origin in its metadata."""
        order = {n: {"shape": list(self.shapes[n]), "count": i.numel()} for n, i in self.indices.items()}
        record = {"version": MASK_FORMAT_VERSION, "tensors": order, "made": self.made}
        tensors = {f"{n}.gaps": gaps.encode(i) for n, i in self.indices.items()}
        # One key: safetensors writes several in any order, and equal masks should be equal files.
        metadata = {METADATA_KEY: json.dumps(record)}
        atomic_write(path, lambda file: safetensors.torch.save_file(tensors, file, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> SparsityMask:
        """Read what `save` wrote; UserError when the file is missing, damaged or not a mask."""
        try:
            check_readable(path)
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if METADATA_KEY not in metadata:
                    raise UserError(f"{path} is not a speft mask; a mask is written by SparsityMask.save")
                record = json.loads(metadata[METADATA_KEY])
                if int(record["version"]) > MASK_FORMAT_VERSION:
                    raise UserError(f"{path} has mask format {record['version']}, this speft reads up to {MASK_FORMAT_VERSION}")
                indices, shapes = {}, {}
                for name, entry in record["tensors"].items():
                    shapes[name] = tuple(int(n) for n in entry["shape"])
                    code = file.get_tensor(f"{name}.gaps")
                    indices[name] = gaps.decode(code, int(entry["count"]), math.prod(shapes[name]))
                return cls(indices, shapes, dict(record["made"]))
        except FileNotFoundError:
            raise UserError(f"no mask at {path}") from None
        except UserError:
            raise
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UserError(f"{path} is not a readable speft mask: {error}") from None
        except OSError as error:
            raise UserError(f"{path} is not a readable speft mask: {error.strerror or error}") from None


def budget_record(budget: Budget) -> dict[str, Any]:
    """The budget as plain JSON values, without what was not given."""
    record = {k: v for k, v in asdict(budget).items() if v is not None}
    if budget.density is None:
        record.pop("of")
    return record


def random_origin(made: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The (seed, mode, ...) from which a mask's indices can be drawn again, or None when they cannot."""
    origin = made.get("random")
    return origin if isinstance(origin, Mapping) and "seed" in origin else None
