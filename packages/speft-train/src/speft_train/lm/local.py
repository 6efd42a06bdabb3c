"""Task files of lm-eval over local data: ours and a user's, with `${data}` filled in, in one folder that lm-eval reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speft_core.errors import UserError, nearest

from ..data.sources import read_json_lines
from .rows import GENERATED, PASSED, may_execute

OWN = Path(__file__).parent / "tasks"


def names() -> list[str]:
    """The tasks that come with this package."""
    return sorted(file.stem for file in OWN.glob("*.yaml"))


def prepare(tasks: Sequence[str], data: Path | None, folder: Path) -> tuple[list[str], bool]:
    """Write the local ones of `tasks` into `folder`; (names for lm-eval, whether some of them are lm-eval's own).

    A task is a name of `names()` when there is a data folder, a .yaml file of lm-eval's form, or else a task of lm-eval.
    UserError for a file that is missing, in or beside the task.
    """
    made, foreign = [], False
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            path = Path(task)
            if not path.is_file():
                raise UserError(f"--tasks: {task} does not exist; it must be a task file of lm-eval's form or a task's name")
            made += _write(path, data, folder)
        elif data is not None and task in names():
            made += _write(OWN / f"{task}.yaml", data, folder)
        else:
            foreign = True
            made.append(task)
    return made, foreign


def check_foreign(tasks: Sequence[str], known: Sequence[str], data: Path | None) -> None:
    """UserError for a name that lm-eval has not either."""
    for task in tasks:
        if task not in known:
            hint = nearest(task, [*names(), *known])
            here = f" With --data also: {', '.join(names())}." if data is None else f" Local ones: {', '.join(names())}."
            raise UserError(f"--tasks: lm-eval has no task {task!r}.{hint}{here}")


def _write(path: Path, data: Path | None, folder: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if "${data}" in text:
        if data is None:
            raise UserError(f"--tasks: {path.name} reads local files; name their folder with --data")
        text = text.replace("${data}", str(data.resolve()))
    text = text.replace("${code_metric}", PASSED if may_execute() else GENERATED)
    for module in set(re.findall(r"!function (\w+)\.", text)):  # lm-eval looks for it beside the task file
        if (beside := path.parent / f"{module}.py").is_file():
            shutil.copy(beside, folder)
    tree = yaml.load(text, Loader=_Reader)
    if not isinstance(tree, dict) or not isinstance(tree.get("task"), str):
        raise UserError(f"{path} must be a task of lm-eval's form, with the key task; it is not")
    files = [v for v in (tree.get("dataset_kwargs") or {}).values() if isinstance(v, str) and v.endswith(".jsonl")]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--tasks: {tree['task'].split('_$')[0]} needs {file}, which does not exist")
    column = tree.get("group_by")
    if column is None:
        (folder / f"{tree['task']}.yaml").write_text(text, encoding="utf-8")
        return [tree["task"]]
    return _write_group(path.stem, text, column, Path(files[-1]), folder)


def _write_group(group: str, text: str, column: str, rows: Path, folder: Path) -> list[str]:
    """A task for each value of a column, and the group of all, weighted by their sizes."""
    text = re.sub(r"(?m)^group_by:.*\n", "", text)
    found = list(dict.fromkeys(str(row[column]) for row in read_json_lines(rows) if column in row))
    if not found:
        raise UserError(f"{rows} must have the column {column}; no row has it")
    members = []
    for value in found:
        slug = re.sub(r"\W+", "_", value)
        own = text.replace(f"${{{column}_words}}", value.replace("_", " "))
        own = own.replace(f"{group}_${{{column}}}", f"{group}_{slug}").replace(f"${{{column}}}", value)
        (folder / f"{group}_{slug}.yaml").write_text(own, encoding="utf-8")
        members.append(f"{group}_{slug}")
    metrics = [m["metric"] for m in yaml.load(text, Loader=_Reader)["metric_list"]]
    aggregate = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in metrics]
    tree = {"group": group, "task": members, "aggregate_metric_list": aggregate, "metadata": {"version": 1.0}}
    (folder / f"_{group}.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return [group]


class _Reader(yaml.SafeLoader):
    """Reads task files without calling what they name."""


def _named(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    return f"!function {node.value}"


_Reader.add_constructor("!function", _named)
