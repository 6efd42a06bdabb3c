"""The heads of several tasks as files: `heads.json` and `heads/<task>.safetensors` beside an adapter.

A folder with these is still an ordinary adapter (the body), which whoever does not know of heads can load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from .adapter import SparseAdapter
from .errors import UserError
from .files import atomic_write, check_readable, reason

HEADS_FILE, HEADS_FOLDER, HEADS_VERSION = "heads.json", "heads", 1
TASK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
KINDS = ("classification", "regression", "causal")

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")  # Transformers' kinds of loss

Head = Mapping[str, torch.Tensor]
#: what a head's outputs mean, as Transformers' configuration says it: {"id2label": {"0": name, …}, "problem_type": one of PROBLEMS}
Labels = Mapping[str, Any]


def check_task(task: str) -> None:
    """UserError for a task name that cannot be a file's."""
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise UserError(f"a task's name must be letters, digits, - and _ (at most 64), got {task!r}")


def check_labels(task: str, labels: Labels, head: Head) -> dict[str, Any]:
    """The keys of `labels` that mean something; UserError for labels that are not those of `head`, or no problem that is known."""
    names, problem = labels.get("id2label"), labels.get("problem_type")
    if names is not None:
        whole = isinstance(names, Mapping) and set(names) == {str(i) for i in range(len(names))}
        sizes = {tensor.shape[0] for tensor in head.values() if tensor.dim()}
        if not whole or not all(isinstance(n, str) for n in names.values()) or (head and len(names) not in sizes):
            raise UserError(f"head {task!r}: id2label must name each of its outputs, from '0' on, got {str(names)[:100]}")
    if problem is not None and problem not in PROBLEMS:
        raise UserError(f"head {task!r}: problem_type must be one of {', '.join(PROBLEMS)}, got {str(problem)[:100]!r}")
    return {key: value for key, value in (("id2label", names), ("problem_type", problem)) if value is not None}


def kind_of_outputs(tensors: Iterable[torch.Tensor], labels: Labels) -> str:
    """Whether a head that is not causal is a `classification` or a `regression`: by its problem type, else by its outputs.

    One output is a regression. Which of several layers is the last need not be known: no other one has a single output.
    """
    problem = labels.get("problem_type")
    if problem is None:
        single = any(tensor.dim() > 0 and tensor.shape[0] == 1 for tensor in tensors)
        return "regression" if single else "classification"
    return "regression" if problem == "regression" else "classification"


def save_heads(
    folder: str | Path, heads: Mapping[str, Head], kinds: Mapping[str, str], labels: Mapping[str, Labels] | None = None
) -> None:
    """Write `heads.json` and `heads/<task>.safetensors` into `folder`; heads of earlier saves that are gone are removed.

    labels: task -> what its outputs mean, where that is known.
    """
    folder = Path(folder)
    for task in heads:
        check_task(task)
    meanings = {task: check_labels(task, (labels or {}).get(task, {}), head) for task, head in heads.items()}
    (folder / HEADS_FOLDER).mkdir(parents=True, exist_ok=True)
    for task, head in heads.items():
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.items()}
        path = folder / HEADS_FOLDER / f"{task}.safetensors"
        atomic_write(path, partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"}))
    record = {
        "format_version": HEADS_VERSION,
        "heads": {task: {"kind": kinds.get(task), "tensors": list(head)} | meanings[task] for task, head in heads.items()},
    }
    atomic_write(folder / HEADS_FILE, json.dumps(record, indent=2) + "\n")
    for stale in (folder / HEADS_FOLDER).glob("*.safetensors"):
        if stale.stem not in heads:
            stale.unlink()


def load_heads(folder: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Read what `save_heads` wrote: task -> tensors, task -> kind. UserError for anything missing, damaged or hostile."""
    heads, kinds, _ = _read(Path(folder))
    return heads, kinds


def load_labels(folder: str | Path) -> dict[str, dict[str, Any]]:
    """task -> what its outputs mean, empty where `save_heads` was not told; UserError as `load_heads`."""
    return _read(Path(folder))[2]


def _read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str], dict[str, dict[str, Any]]]:
    heads: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, str] = {}
    labels: dict[str, dict[str, Any]] = {}
    try:
        record = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        if record["format_version"] != HEADS_VERSION:
            raise UserError(f"{HEADS_FILE} has format version {record['format_version']!r}, this speft reads {HEADS_VERSION}")
        for task, entry in record["heads"].items():
            check_task(task)
            file = folder / HEADS_FOLDER / f"{task}.safetensors"
            check_readable(file)
            tensors = safetensors.torch.load_file(file)
            if set(tensors) != set(entry["tensors"]):
                raise UserError(f"head {task!r} holds {sorted(tensors)}, {HEADS_FILE} lists {sorted(entry['tensors'])}")
            SparseAdapter({}, tensors).check()
            if entry["kind"] not in KINDS:
                raise UserError(f"head {task!r}: kind must be one of {', '.join(KINDS)}, got {entry['kind']!r}")
            heads[task], kinds[task], labels[task] = tensors, entry["kind"], check_labels(task, entry, tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no complete heads: {Path(error.filename or HEADS_FILE).name} missing") from None
    except OSError as error:
        raise UserError(f"{folder} has no readable heads: {reason(error)}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} has no readable heads: {type(error).__name__}: {str(error)[:200]}") from None
    if not heads:
        raise UserError(f"{folder}: {HEADS_FILE} lists no heads")
    return heads, kinds, labels
