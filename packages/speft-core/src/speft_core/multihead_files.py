"""The heads of several tasks as files: `heads.json` and `heads/<task>.safetensors` beside an adapter.

A folder with these is still an ordinary adapter (the body), which whoever does not know of heads can load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from .adapter import SparseAdapter
from .errors import UserError
from .files import atomic_write

HEADS_FILE, HEADS_FOLDER, HEADS_VERSION = "heads.json", "heads", 1
TASK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
KINDS = ("classification", "regression", "causal")

Head = Mapping[str, torch.Tensor]


def check_task(task: str) -> None:
    """UserError for a task name that cannot be a file's."""
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise UserError(f"a task's name must be letters, digits, - and _ (at most 64), got {task!r}")


def save_heads(folder: str | Path, heads: Mapping[str, Head], kinds: Mapping[str, str]) -> None:
    """Write `heads.json` and `heads/<task>.safetensors` into `folder`; heads of earlier saves that are gone are removed."""
    folder = Path(folder)
    for task in heads:
        check_task(task)
    (folder / HEADS_FOLDER).mkdir(parents=True, exist_ok=True)
    for task, head in heads.items():
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.items()}
        path = folder / HEADS_FOLDER / f"{task}.safetensors"
        atomic_write(path, partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"}))
    record = {
        "format_version": HEADS_VERSION,
        "heads": {task: {"kind": kinds.get(task), "tensors": list(head)} for task, head in heads.items()},
    }
    atomic_write(folder / HEADS_FILE, json.dumps(record, indent=2) + "\n")
    for stale in (folder / HEADS_FOLDER).glob("*.safetensors"):
        if stale.stem not in heads:
            stale.unlink()


def load_heads(folder: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Read what `save_heads` wrote: task -> tensors, task -> kind. UserError for anything missing, damaged or hostile."""
    folder = Path(folder)
    heads: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, str] = {}
    try:
        record = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        if record["format_version"] != HEADS_VERSION:
            raise UserError(f"{HEADS_FILE} has format version {record['format_version']!r}, this speft reads {HEADS_VERSION}")
        for task, entry in record["heads"].items():
            check_task(task)
            tensors = safetensors.torch.load_file(folder / HEADS_FOLDER / f"{task}.safetensors")
            if set(tensors) != set(entry["tensors"]):
                raise UserError(f"head {task!r} holds {sorted(tensors)}, {HEADS_FILE} lists {sorted(entry['tensors'])}")
            SparseAdapter({}, tensors).check()
            if entry["kind"] not in KINDS:
                raise UserError(f"head {task!r}: kind must be one of {', '.join(KINDS)}, got {entry['kind']!r}")
            heads[task], kinds[task] = tensors, entry["kind"]
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no complete heads: {Path(error.filename or HEADS_FILE).name} missing") from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{folder} has no readable heads: {type(error).__name__}: {str(error)[:200]}") from None
    if not heads:
        raise UserError(f"{folder}: {HEADS_FILE} lists no heads")
    return heads, kinds
