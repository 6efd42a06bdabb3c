"""Evaluation figures in the two forms the Hub reads: `model-index` in the card, and `.eval_results/*.yaml`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from speft_core import UserError

from .licences import HUB_ID, check_number


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One figure: a metric of the adapted model on a data set, and of the base model where it is known."""

    dataset: str
    metric: str
    value: float
    base: float | None = None
    split: str = "test"
    task: str = "text-generation"
    revision: str | None = None

    def __post_init__(self) -> None:
        check_number(f"{self.metric} on {self.dataset}", self.value)
        if self.base is not None:
            check_number(f"{self.metric} of the base on {self.dataset}", self.base)

    @property
    def on_hub(self) -> bool:
        """Whether the data set is named by an id on the Hub."""
        return bool(HUB_ID.fullmatch(self.dataset)) and "/" in self.dataset


EVAL_RESULTS = ".eval_results/speft.yaml"  # ours; what else lies in that folder is others'
NOT_METRICS = frozenset({"count", "seconds", "examples", "samples", "tokens"})


def read_results(path: Path, folder: Path, task: str = "text-generation") -> list[Evaluation]:
    """The figures in a run's `results.json` (`base` and `adapted`, metric -> number), named by the data they are of.

    `adapted.split` says which rows those are, "test" where it is missing. task: what the model does, as the Hub calls it.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}, whose figures the card should show")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(record).__name__}")
    adapted, base = record.get("adapted"), record.get("base")
    if not isinstance(adapted, dict):
        return []
    split = _split(adapted)
    base = base if isinstance(base, dict) and _split(base) == split else {}  # other rows are no comparison
    dataset = str(record.get("dataset") or _data(folder, split))
    found = []
    for metric, value in adapted.items():
        if metric in NOT_METRICS or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        before = base.get(metric)
        before = before if isinstance(before, (int, float)) and not isinstance(before, bool) else None
        found.append(Evaluation(dataset=dataset, metric=str(metric), value=value, base=before, split=split, task=task))
    return found


def _split(figures: dict[str, Any]) -> str:
    split = figures.get("split")
    return split if isinstance(split, str) and split else "test"


def _data(folder: Path, split: str) -> str:
    """What the run was scored on, from its configuration; a path of this machine is cut to its last part."""
    path = folder / "training_config.yaml"
    if not path.is_file():
        return "unnamed"
    try:
        data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
        name = str(data.get(split) or data.get("train") or "unnamed")
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        return "unnamed"
    return name if HUB_ID.fullmatch(name) or name.startswith("bundled:") else Path(name).name


def model_index(name: str, evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """The `model-index` of a card: one result per data set and split, its metrics below."""
    results: dict[tuple[str, str, str], dict[str, Any]] = {}
    for e in evaluations:
        new = {
            "task": {"type": e.task},
            "dataset": {"name": e.dataset, "type": e.dataset, "split": e.split}
            | ({"revision": e.revision} if e.revision else {}),
            "metrics": [],
        }
        entry = results.setdefault((e.dataset, e.split, e.task), new)
        entry["metrics"].append({"type": e.metric, "value": e.value, "name": e.metric})
    return [{"name": name, "results": list(results.values())}] if results else []


def eval_results_yaml(evaluations: list[Evaluation]) -> str:
    """The text of the file EVAL_RESULTS: the figures on data sets of the Hub; empty when there are none."""
    entries: list[dict[str, Any]] = []
    for e in evaluations:
        if e.on_hub:
            dataset = {"id": e.dataset, "task_id": e.split} | ({"revision": e.revision} if e.revision else {})
            entries.append({"dataset": dataset, "value": e.value, "notes": e.metric})
    return yaml.safe_dump(entries, sort_keys=False) if entries else ""
