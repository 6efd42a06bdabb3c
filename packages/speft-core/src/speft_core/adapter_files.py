"""The two files of an adapter folder, `adapter_config.json` and `adapter_model.safetensors`, written and read (docs/formats.md).

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

from . import gaps
from .delta import VALUE_DTYPES, SparseDelta
from .errors import UserError
from .files import atomic_files, check_readable, reason
from .random_mask import bernoulli_indices, random_indices
from .threads import each

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
    budget: dict[str, Any] = field(default_factory=dict)  #: what was asked: k, density and of what, like_lora_r
    targets: list[str] = field(default_factory=list)  #: as given to find_mask
    seed: int | None = None  #: seed of the mask
    random: dict[str, Any] | None = None  #: seed and mode from which the indices are drawn again
    library_versions: dict[str, str] = field(default_factory=dict)  #: package -> version
    extra: dict[str, Any] = field(default_factory=dict)  #: anything else, kept as it is (merge provenance, ...)


#: deltas, dense tensors, config, fingerprint
Contents = tuple[dict[str, SparseDelta], dict[str, torch.Tensor], AdapterConfig, dict[str, dict[str, Any]]]


def write_folder(folder: Path, contents: Contents) -> None:
    """Write both files; the folder holds the old pair or the new one, whatever goes wrong while writing."""
    deltas, dense, config, fingerprint = contents
    tensors: dict[str, torch.Tensor] = {}
    listed: dict[str, dict[str, Any]] = {}
    for name, delta in deltas.items():
        tensors[f"{name}.values"] = delta.values_K.detach().cpu().contiguous()
        if not _drawn_again(config, name, delta):
            tensors[f"{name}.gaps"] = gaps.encode(delta.indices_K)
        listed[name] = {"shape": list(delta.shape), **{k: v for k, v in fingerprint.get(name, {}).items() if k != "shape"}}
    for name, tensor in dense.items():
        tensors[f"dense.{name}"] = tensor.detach().cpu().contiguous().clone()
    text = config_text(config, sum(d.nnz for d in deltas.values()), listed)
    atomic_files(
        {
            folder / WEIGHTS_FILE: lambda file: safetensors.torch.save_file(tensors, file, metadata={"format": "pt"}),
            folder / CONFIG_FILE: text,
        }
    )


def config_text(config: AdapterConfig, nnz: int, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """`adapter_config.json`: what the adapter says of itself, then a line for each tensor."""
    record = {"format": "speft", "format_version": FORMAT_VERSION, **asdict(config), "nnz": nnz}
    rows = [f"{json.dumps(n)}: {json.dumps(entry, separators=(',', ':'))}" for n, entry in listed.items()]
    return json.dumps(record, indent=2)[:-2] + ',\n  "tensors": {\n' + ",\n".join(rows) + "\n  }\n}\n"


def _check_files(folder: Path) -> None:
    missing = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            check_readable(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
        except OSError as error:
            raise UserError(f"{folder} is not a readable adapter: {reason(error)}") from None
    if missing:
        raise UserError(f"no adapter at {folder}: {' and '.join(missing)} missing")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with the files of `folder` becomes a UserError of one line that names it."""
    _check_files(folder)
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except SafetensorError as error:
        raise UserError(
            f"{folder} is not a readable adapter: {WEIGHTS_FILE} is damaged or cut short ({str(error)[:200]})"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} is not a readable adapter: {reason(error)}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder} is not a readable adapter: {type(error).__name__}: {str(error)[:200]}") from None


def read_folder(folder: Path, device: str) -> Contents:
    """Read both files; UserError (one line that names the folder) for anything missing, damaged or hostile."""
    with readable(folder):
        return read_weights(folder / WEIGHTS_FILE, read_config(folder / CONFIG_FILE), device)


def _drawn_again(config: AdapterConfig, name: str, delta: SparseDelta) -> bool:
    """Whether the seeded draw that the config names gives exactly the indices of `delta`."""
    if not config.random:
        return False
    try:
        drawn_K = draw(config.random, name, delta.numel, delta.nnz)
    except UserError:  # another count than that draw has: the indices are stored
        return False
    return torch.equal(drawn_K, delta.indices_K.cpu())


def draw(origin: Mapping[str, Any], name: str, numel: int, count: int) -> torch.Tensor:
    """The indices that a seeded random mask keeps of tensor `name`; `count` must agree with a Bernoulli draw."""
    seed, mode = int(origin["seed"]), origin.get("mode", "exact")
    if mode == "exact":
        return random_indices(seed, name, numel, count)
    if mode == "bernoulli":
        if numel > MAX_BERNOULLI_NUMEL:
            raise UserError(f"{name}: a Bernoulli mask covers at most {MAX_BERNOULLI_NUMEL:,} elements a tensor, got {numel:,}")
        density = float(origin["density"])
        expected = density * numel
        # Checked before drawing, which takes time and memory in proportion: a file cannot claim more than it holds values for.
        if not MIN_BERNOULLI_DENSITY <= density <= 1 or abs(count - expected) > 10 * math.sqrt(expected) + 10:
            raise UserError(f"{name}: {count:,} values are no Bernoulli draw of density {density} from {numel:,} elements")
        return bernoulli_indices(seed, name, numel, density)
    raise UserError(f"random.mode must be exact or bernoulli, got {mode!r}")


def read_config(path: Path) -> dict[str, Any]:
    """The record in an adapter's config file; UserError when it is not one, too large, or of a newer format."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path.name} must be at most {MAX_CONFIG_BYTES:,} bytes, it has {path.stat().st_size:,}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path.name} is nested too deeply") from None
    if not isinstance(record, dict) or record.get("format") != "speft":
        raise UserError(f'{path.name} must be a speft adapter (its "format" says "speft"); is this a PEFT adapter?')
    version = record.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path.name} has format version {version!r}, this speft reads 1 to {FORMAT_VERSION}; upgrade speft-core"
        )
    return record


@dataclass(frozen=True)
class _Stored:
    """One tensor's change as it lies in the file; `decoded` makes a delta of it."""

    name: str
    shape: tuple[int, ...]
    values_K: torch.Tensor
    code: torch.Tensor | None  # None: a seeded random mask
    random: Mapping[str, Any] | None

    def decoded(self) -> SparseDelta:
        """The delta, checked: by the decoding of its indices, or because they were drawn here, and value by value."""
        name, values_K, numel = self.name, self.values_K, math.prod(self.shape)
        if values_K.dim() != 1 or values_K.dtype not in VALUE_DTYPES or values_K.numel() > numel:
            got = f"{values_K.dtype} of shape {tuple(values_K.shape)}"
            raise UserError(f"{name}: values must be 1-D floating point, at most {numel:,} of them, got {got}")
        if self.code is not None:
            indices_K = gaps.decode(self.code, values_K.numel(), numel)
        elif self.random:
            indices_K = draw(self.random, name, numel, values_K.numel())
        else:
            raise UserError(f"{name} has values but no gaps, and the mask is not a seeded random one")
        return SparseDelta(indices_K.to(values_K.device), values_K, self.shape).check_values(name)


def _stored(file: Any, present: set[str], name: str, entry: Mapping[str, Any], config: AdapterConfig) -> _Stored:
    shape = tuple(int(n) for n in entry["shape"])
    if any(n < 0 for n in shape):
        raise UserError(f"{name}: a shape has no negative sizes, got {shape}")
    code = file.get_tensor(f"{name}.gaps") if f"{name}.gaps" in present else None
    return _Stored(name, shape, file.get_tensor(f"{name}.values"), code, config.random)


def read_delta(file: Any, present: set[str], name: str, entry: Mapping[str, Any], config: AdapterConfig) -> SparseDelta:
    """Read and check one tensor's change from an open weights file whose keys are `present`; `entry` is its config line."""
    return _stored(file, present, name, entry, config).decoded()


def read_frame(
    file: Any, record: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Of an open weights file: the config, the dense tensors as they are, and name -> entry of each sparse tensor.

    UserError when the file holds what the config `record` does not list, but for `dense.` tensors.
    """
    known = {f.name for f in fields(AdapterConfig)}
    config = AdapterConfig(**{k: v for k, v in record.items() if k in known})
    listed: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in record["tensors"].items()}
    rest = sorted(set(file.keys()) - {f"{name}.{part}" for name in listed for part in ("values", "gaps")})
    strangers = [key for key in rest if not key.startswith("dense.")]
    if strangers:
        raise UserError(f"{WEIGHTS_FILE} holds {strangers[0]!r}, which {CONFIG_FILE} does not list")
    return config, {key.removeprefix("dense."): file.get_tensor(key) for key in rest}, listed


def read_weights(path: Path, record: Mapping[str, Any], device: str) -> Contents:
    """Everything in the weights file that the config `record` lists. The deltas come back checked, dense tensors as they are."""
    with safe_open(str(path), framework="pt", device=device) as file:
        config, dense, listed = read_frame(file, record)
        present = set(file.keys())
        stored = [_stored(file, present, name, entry, config) for name, entry in listed.items()]
        deltas = dict(zip(listed, each(_Stored.decoded, stored), strict=True))
    return deltas, dense, config, listed
