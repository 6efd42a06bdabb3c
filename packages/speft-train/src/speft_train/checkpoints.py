"""Checkpoint folders: what is trained and no frozen weight; a COMPLETE marker; which one to resume from.

checkpoint-120/
  trainable.safetensors   every trained parameter by name (rank 0)
  dynamic.safetensors     of a mask that changes: what trains, what rests, how far it moved, the changes so far
  global_step120/         DeepSpeed: each rank's optimizer state       optimizer.pt   one plain process
  scheduler.pt, trainer_state.json, rng_state*.pth                     of transformers
  COMPLETE                written last, after all ranks have written theirs; what made it, its batch and steps in all, what its files held
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import speft_core as sc
from speft_core.errors import UserError
from speft_core.files import atomic_write
from speft_core.partitioned import whole
from speft_core.targets import parameter_shape

MARKER = "COMPLETE"
TRAINABLE, DYNAMIC = "trainable.safetensors", "dynamic.safetensors"
PREFIX = "checkpoint-"
STATE = "trainer_state.json"
# Keys of the marker: examples of one optimizer step over all processes, steps of the whole run, what it trains on (contents.py).
BATCH, STEPS, FILES = "global_batch", "steps", "files"
# Left free beside a checkpoint: the report, the logs and the adapter follow.
SPARE_BYTES = 64 << 20
# Bytes a checkpoint keeps of a trained scalar at most: values, a float32 copy, two moments.
BYTES_PER_SCALAR = 16


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder by its name; -1 for other names."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdigit() else -1


def found(run: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest step first."""
    return sorted((f for f in run.glob(f"{PREFIX}*") if f.is_dir() and step_of(f) >= 0), key=step_of)


def complete(run: Path) -> list[Path]:
    """Those that were written to the end, oldest step first."""
    return [f for f in found(run) if (f / MARKER).is_file()]


def remove_incomplete(run: Path) -> list[str]:
    """Remove what a kill in mid-save left behind; the names of what was removed."""
    broken = [f for f in found(run) if not (f / MARKER).is_file()]
    for folder in broken:
        shutil.rmtree(folder)
    return [f.name for f in broken]


def mark_complete(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the marker; `record` says which setup can load the optimizer's state, and the run's BATCH, STEPS and FILES."""
    atomic_write(folder / MARKER, json.dumps(dict(record)) + "\n")


def unmark(folder: Path) -> None:
    """The folder is about to be written again."""
    (folder / MARKER).unlink(missing_ok=True)


def made_by(folder: Path) -> dict[str, Any]:
    """The setup that can load the optimizer's state."""
    return {key: value for key, value in _json(folder / MARKER).items() if key not in (BATCH, STEPS, FILES)}


def plan(folder: Path) -> dict[str, int]:
    """BATCH and STEPS of the run that the checkpoint is of; without them where an older version has written it."""
    return {key: value for key, value in _json(folder / MARKER).items() if key in (BATCH, STEPS)}


def contents(folder: Path) -> dict[str, str]:
    """FILES of the run that the checkpoint is of: key -> hash; empty where an older version has written it."""
    found = _json(folder / MARKER).get(FILES)
    return found if isinstance(found, dict) else {}


def state(folder: Path) -> dict[str, Any]:
    """The Trainer's state: its log, the best checkpoint, what its callbacks have counted."""
    found = _json(folder / STATE)
    if not found:
        raise UserError(f"{folder / STATE} cannot be read; remove {folder} to start from the one before")
    return found


def shipped(newest: Path, best: bool) -> Path:
    """The checkpoint whose values ship once training is over: the newest one, or the best where that is asked for."""
    found = state(newest).get("best_model_checkpoint") if best else None
    return newest.parent / Path(found).name if found else newest


def rotate(run: Path, limit: int | None, keep: str | None = None) -> None:
    """Remove the oldest complete checkpoints beyond `limit`; never the newest, nor the one named `keep`."""
    if not limit:
        return
    for folder in complete(run)[:-limit]:
        if keep is None or folder.name != Path(keep).name:
            unmark(folder)
            shutil.rmtree(folder)


def settle(run: Path, limit: int | None, best: bool) -> None:
    """The run is over and nothing resumes any more: with a limit of 1 no other checkpoint stays than the one that shipped."""
    folders = complete(run)
    if limit != 1 or not folders:
        return
    kept = shipped(folders[-1], best)
    for folder in folders:
        if folder != kept and kept in folders:
            unmark(folder)
            shutil.rmtree(folder)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of all that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trainable(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write every trained parameter: name -> tensor on the CPU. OSError when the disk is full."""
    require_space(folder.parent, sum(p.numel() * BYTES_PER_SCALAR for p in state.values()), f"checkpoint {folder.name}")
    atomic_write(folder / TRAINABLE, lambda file: safetensors.torch.save_file(dict(state), file))


def save_dynamic(dynamic: sc.DynamicMask, folder: Path) -> None:
    """Write the state of a mask that changes."""
    state = dynamic.state_dict()
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.pop("tensors").items()}
    metadata = {"state": json.dumps(state)}
    atomic_write(folder / DYNAMIC, lambda file: safetensors.torch.save_file(tensors, file, metadata=metadata))


def load(model: nn.Module, folder: Path, dynamic: sc.DynamicMask | None = None) -> None:
    """Put a checkpoint's values, and the mask that it had, into the model."""
    if dynamic is not None:
        try:
            with safetensors.safe_open(str(folder / DYNAMIC), framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                state["tensors"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{folder / DYNAMIC} cannot be read ({error}); remove {folder} to start from the one before"
            ) from None
        dynamic.load_state_dict(state)
    load_trainable(model, folder)


@torch.no_grad()
def load_trainable(model: nn.Module, folder: Path) -> None:
    """Put saved values into the model's trained parameters; names and shapes must agree exactly. All ranks call it."""
    try:
        state = safetensors.torch.load_file(str(folder / TRAINABLE))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder / TRAINABLE} cannot be read ({error}); remove {folder} to start from the one before"
        ) from None
    ours = trainable(model)
    if set(ours) != set(state):
        odd = sorted(set(ours) ^ set(state))[0]
        raise UserError(f"{folder} does not fit this run: {odd} is trained in only one of them")
    for name, parameter in ours.items():
        if parameter_shape(parameter) != tuple(state[name].shape):
            shapes = f"{tuple(state[name].shape)} there and {parameter_shape(parameter)} here"
            raise UserError(f"{folder} does not fit this run: {name} has shape {shapes}")
    for name, parameter in ours.items():
        with whole([parameter], change=True):
            parameter.copy_(state[name])


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise a UserError when the disk cannot hold `needed` bytes more."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        wanted = (needed + SPARE_BYTES) / 2**20
        raise UserError(f"no space for {what}: it needs {wanted:,.0f} MiB, {folder} has {free / 2**20:,.0f} MiB free")


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
