"""The adapter: what was learned, as a folder of a few megabytes; put onto a model in place and taken off bit for bit.

Shape suffixes: K kept entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import gaps
from .delta import VALUE_DTYPES, SparseDelta
from .errors import UserError
from .files import atomic_write
from .fingerprint import check_fingerprint
from .random_mask import bernoulli_indices, random_indices
from .targets import base_parameters
from .writing import add_values, gather, scatter

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 << 20
MAX_BERNOULLI_NUMEL = 1 << 34  # a draw takes time in proportion; the largest real matrices have 2**33 elements
MIN_BERNOULLI_DENSITY = 1e-7  # less is no mask, only a way to make a reader draw for hours


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter says of itself; `adapter_config.json`."""

    base_model_name_or_path: str | None = None  #: id or folder of the base model
    base_model_revision: str | None = None  #: commit of the base model
    task_type: str | None = None  #: CAUSAL_LM, SEQ_CLS, ...
    metric: str | None = None  #: saliency metric of the mask
    scope: str | None = None  #: "global" or "local"
    budget: dict[str, Any] = field(
        default_factory=dict
    )  #: what was asked: k, density and of what, like_lora_r
    targets: list[str] = field(default_factory=list)  #: as given to find_mask
    seed: int | None = None  #: seed of the mask
    random: dict[str, Any] | None = (
        None  #: seed and mode from which the indices are drawn again
    )
    library_versions: dict[str, str] = field(
        default_factory=dict
    )  #: package -> version
    extra: dict[str, Any] = field(
        default_factory=dict
    )  #: anything else, kept as it is (merge provenance, ...)


@dataclass(frozen=True, eq=False)
class SparseAdapter:
    """All that was learned.

    deltas: parameter name -> SparseDelta. dense: parameter name -> the whole tensor (heads), which replaces the model's.
    config: AdapterConfig. fingerprint: parameter name -> shape and hashes of the base (see fingerprint.py).
    """

    deltas: dict[str, SparseDelta]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    config: AdapterConfig = field(default_factory=AdapterConfig)
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def nnz(self) -> int:
        """How many sparse entries are kept in all."""
        return sum(d.nnz for d in self.deltas.values())

    def check(self) -> SparseAdapter:
        """Return self, or raise UserError naming the first tensor that is out of range, unsorted or not finite."""
        for name, delta in self.deltas.items():
            delta.check(name)
        for name, tensor in self.dense.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"dense.{name}: must be finite floating point, got {tensor.dtype} or NaN or infinity"
                )
            if name in self.deltas:
                raise UserError(f"{name} is both sparse and dense in one adapter")
        return self

    def check_base(self, model: nn.Module) -> None:
        """Raise UserError naming the first tensor in which `model` is not the base of this adapter.

        Names, shapes and a hash of the base's entries are compared; see fingerprint.py for models in another dtype.
        """
        parameters = base_parameters(model)
        base = self.config.base_model_name_or_path or "an unnamed model"
        for name in (*self.deltas, *self.dense):
            if name not in parameters:
                raise UserError(
                    f"this adapter is for another base ({base}): the model has no parameter {name!r}"
                )
        for name, delta in self.deltas.items():
            check_fingerprint(
                name, parameters[name], delta, self.fingerprint.get(name), base
            )
        for name, tensor in self.dense.items():
            if parameters[name].shape != tensor.shape:
                shapes = f"{tuple(parameters[name].shape)}, the adapter wants {tuple(tensor.shape)}"
                raise UserError(
                    f"this adapter is for another base ({base}): {name} has shape {shapes}"
                )

    def apply(self, model: nn.Module, check_base: bool = True) -> Applied:
        """Write the adapter into `model` in place and return the handle whose `.restore()` takes it off, bit for bit.

        Everything is checked before the first weight is touched. UserError for another base, or while a tuner is attached.
        """
        if getattr(model, "_speft_tuner", None) is not None:
            raise UserError(
                "an adapter cannot be applied while a tuner is attached; call tuner.detach() first"
            )
        self.check()
        if check_base:
            self.check_base(model)
        return Applied(self, model)

    @contextmanager
    def applied(self, model: nn.Module, check_base: bool = True) -> Iterator[nn.Module]:
        """`with adapter.applied(model): ...` — in place, no copy; restored bit for bit on exit."""
        handle = self.apply(model, check_base)
        try:
            yield model
        finally:
            handle.restore()

    def save(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder` (made when missing)."""
        self.check()
        folder = Path(folder)
        tensors: dict[str, torch.Tensor] = {}
        listed: dict[str, dict[str, Any]] = {}
        for name, delta in self.deltas.items():
            tensors[f"{name}.values"] = delta.values_K.detach().cpu().contiguous()
            if not self._drawn_again(name, delta):
                tensors[f"{name}.gaps"] = gaps.encode(delta.indices_K)
            listed[name] = {
                "shape": list(delta.shape),
                **{
                    k: v
                    for k, v in self.fingerprint.get(name, {}).items()
                    if k != "shape"
                },
            }
        for name, tensor in self.dense.items():
            tensors[f"dense.{name}"] = tensor.detach().cpu().contiguous().clone()
        record = {
            "format": "speft",
            "format_version": FORMAT_VERSION,
            **asdict(self.config),
            "nnz": self.nnz,
        }
        text = json.dumps(record, indent=2)[:-2] + ',\n  "tensors": {\n'
        rows = [
            f"{json.dumps(n)}: {json.dumps(entry, separators=(',', ':'))}"
            for n, entry in listed.items()
        ]
        atomic_write(
            folder / WEIGHTS_FILE,
            lambda file: safetensors.torch.save_file(
                tensors, file, metadata={"format": "pt"}
            ),
        )
        atomic_write(folder / CONFIG_FILE, text + ",\n".join(rows) + "\n  }\n}\n")

    def _drawn_again(self, name: str, delta: SparseDelta) -> bool:
        """Whether the seeded draw that the config names gives exactly the indices of `delta`."""
        if not self.config.random:
            return False
        try:
            drawn_K = draw(self.config.random, name, delta.numel, delta.nnz)
        except UserError:  # another count than that draw has: the indices are stored
            return False
        return torch.equal(drawn_K, delta.indices_K.cpu())

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str = "cpu"
    ) -> SparseAdapter:
        """Read and check the adapter in `folder`; UserError (one line) for anything missing, damaged or hostile."""
        folder = Path(folder)
        if (
            not (folder / CONFIG_FILE).is_file()
            or not (folder / WEIGHTS_FILE).is_file()
        ):
            missing = [
                f for f in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / f).is_file()
            ]
            raise UserError(f"no adapter at {folder}: {' and '.join(missing)} missing")
        try:
            record = read_config(folder / CONFIG_FILE)
            adapter = _read_weights(cls, folder / WEIGHTS_FILE, record, str(device))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            OSError,
        ) as error:
            raise UserError(
                f"{folder} is not a readable adapter: {type(error).__name__}: {str(error)[:200]}"
            ) from None
        return adapter.check()


def draw(origin: Mapping[str, Any], name: str, numel: int, count: int) -> torch.Tensor:
    """The indices that a seeded random mask keeps of tensor `name`; `count` must agree with a Bernoulli draw."""
    seed, mode = int(origin["seed"]), origin.get("mode", "exact")
    if mode == "exact":
        return random_indices(seed, name, numel, count)
    if mode == "bernoulli":
        if numel > MAX_BERNOULLI_NUMEL:
            raise UserError(
                f"{name}: a Bernoulli mask covers at most {MAX_BERNOULLI_NUMEL:,} elements a tensor, got {numel:,}"
            )
        density = float(origin["density"])
        expected = density * numel
        # Checked before drawing, which takes time and memory in proportion: a file cannot claim more than it holds values for.
        if not MIN_BERNOULLI_DENSITY <= density <= 1 or abs(count - expected) > 10 * math.sqrt(expected) + 10:
            raise UserError(f"{name}: {count:,} values are no Bernoulli draw of density {density} from {numel:,} elements")
        return bernoulli_indices(seed, name, numel, density)
    raise UserError(f"random.mode must be exact or bernoulli, got {mode!r}")


def read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(
            f"{path.name} must be at most {MAX_CONFIG_BYTES:,} bytes, it has {path.stat().st_size:,}"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path.name} is nested too deeply") from None
    if not isinstance(record, dict) or record.get("format") != "speft":
        raise UserError(
            f'{path.name} must be a speft adapter (its "format" says "speft"); is this a PEFT adapter?'
        )
    version = record.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path.name} has format version {version!r}, this speft reads 1 to {FORMAT_VERSION}; upgrade speft-core"
        )
    return record


def read_delta(file: Any, present: set[str], name: str, entry: Mapping[str, Any], config: AdapterConfig) -> SparseDelta:
    """Read one tensor's change from an open weights file whose keys are `present`; `entry` is its line in the config."""
    shape = tuple(int(n) for n in entry["shape"])
    if any(n < 0 for n in shape):
        raise UserError(f"{name}: a shape has no negative sizes, got {shape}")
    numel = math.prod(shape)
    values_K = file.get_tensor(f"{name}.values")
    if values_K.dim() != 1 or values_K.dtype not in VALUE_DTYPES or values_K.numel() > numel:
        got = f"{values_K.dtype} of shape {tuple(values_K.shape)}"
        raise UserError(f"{name}: values must be 1-D floating point, at most {numel:,} of them, got {got}")
    if f"{name}.gaps" in present:
        indices_K = gaps.decode(file.get_tensor(f"{name}.gaps"), values_K.numel(), numel)
    elif config.random:
        indices_K = draw(config.random, name, numel, values_K.numel())
    else:
        raise UserError(f"{name} has values but no gaps, and the mask is not a seeded random one")
    return SparseDelta(indices_K.to(values_K.device), values_K, shape)


def _read_weights(
    cls: type[SparseAdapter], path: Path, record: dict[str, Any], device: str
) -> SparseAdapter:
    known = {f.name for f in fields(AdapterConfig)}
    config = AdapterConfig(**{k: v for k, v in record.items() if k in known})
    deltas, dense, expected = {}, {}, set()
    with safe_open(str(path), framework="pt", device=device) as file:
        present = set(file.keys())
        for name, entry in record["tensors"].items():
            deltas[name] = read_delta(file, present, name, entry, config)
            expected.update((f"{name}.values", f"{name}.gaps"))
        for key in sorted(present - expected):
            if not key.startswith("dense."):
                raise UserError(
                    f"{path.name} holds {key!r}, which {CONFIG_FILE} does not list"
                )
            dense[key.removeprefix("dense.")] = file.get_tensor(key)
    prints = {n: dict(entry) for n, entry in record["tensors"].items()}
    return cls(deltas, dense, config, prints)


class Applied:
    """An adapter that sits in a model. Several may be stacked; they come off in the reverse order."""

    def __init__(self, adapter: SparseAdapter, model: nn.Module) -> None:
        self._model = model
        parameters = base_parameters(model)
        self._saved_dense = {n: parameters[n].detach().clone() for n in adapter.dense}
        self._saved: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, delta in adapter.deltas.items():
            weight = parameters[name]
            indices_K = delta.indices_K.to(weight.device)
            base_K = gather(weight, indices_K)
            self._saved[name] = (indices_K, base_K)
            scatter(
                weight, indices_K, add_values(base_K, delta.values_K.to(weight.device))
            )
        for name, tensor in adapter.dense.items():
            parameters[name].data.copy_(tensor)
        self._stack: list[Applied] = model.__dict__.setdefault("_speft_applied", [])
        self._stack.append(self)

    def restore(self) -> None:
        """Put the base's bits back. A second call does nothing; UserError when a later adapter still sits on top."""
        if self not in self._stack:
            return
        if self._stack[-1] is not self:
            raise UserError(
                "adapters come off in the reverse order: restore the one applied last first"
            )
        parameters = base_parameters(self._model)
        for name, (indices_K, base_K) in self._saved.items():
            weight = parameters[name]
            scatter(weight, indices_K.to(weight.device), base_K.to(weight.device))
        for name, tensor in self._saved_dense.items():
            parameters[name].data.copy_(tensor)
        self._stack.pop()
        self._saved, self._saved_dense = {}, {}
