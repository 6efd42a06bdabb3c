"""`speft-train eval`: the order of the work, and the table that it ends in."""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speft_core.errors import UserError
from speft_core.files import atomic_write

from . import local, rows
from .subjects import Subject, applied, bases, subjects

RESULTS, TABLE = "eval.json", "eval.md"
HIDDEN = ("alias", "name", "sample_len", "sample_count")
Figures = dict[str, dict[str, Any]]  # task -> {"metric,filter": value}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    data: Path | None = None
    base: bool = True
    output: Path | None = None
    model: str | None = None
    dtype: str | None = None
    execute_code: bool = False
    chat: bool = False
    seed: int = 0


def evaluate(paths: list[str], settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Evaluate each path, and the base of the adapters among them; print the table, and write it where asked or to the run."""
    console = console or Console()
    if settings.data is not None and not settings.data.is_dir():
        raise UserError(f"--data must be a folder; {settings.data} is not one")
    output = settings.output or _own_folder(paths)
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output must be a folder; {output} is a file")
    columns = subjects(paths, settings.model, settings.dtype)
    if settings.base:
        columns = [*bases(columns), *columns]
    os.environ[rows.ALLOW] = "1" if settings.execute_code else "0"
    _require_lm_eval()
    with tempfile.TemporaryDirectory(prefix="speft-tasks-") as folder:
        names, foreign = local.prepare(settings.tasks, settings.data, Path(folder))
        manager = _manager(folder, foreign)
        local.check_foreign(names, manager.all_tasks, settings.data)
        found: dict[str, Figures] = {}
        made = {
            "columns": found, "tasks": list(settings.tasks), "num_fewshot": settings.num_fewshot, "limit": settings.limit,
            "seed": settings.seed, "versions": _versions(),
        }  # fmt: skip
        files = _slugs([column.name for column in columns])
        for column, result in _columns(columns, names, manager, settings, console):
            found[column] = _figures(result)
            if output is not None:  # it may have taken hours: it stays when a later column fails
                _write(output, made, files[column], result.get("samples") or {})
    console.print(_table(found))
    if any(rows.GENERATED in key for tasks in found.values() for figures in tasks.values() for key in figures):
        console.print("Generated code was not run; --execute-code runs it, which gives pass@1.", highlight=False)
    if output is not None:
        console.print(f"wrote {output / RESULTS}, {output / TABLE} and samples of what was answered", highlight=False)
    return made


def _write(output: Path, made: Mapping[str, Any], slug: str, samples: Mapping[str, Any]) -> None:
    """The figures so far, and the answers of a column."""
    for task, answers in samples.items():
        lines = "".join(json.dumps(_sample(a), default=str) + "\n" for a in answers)
        atomic_write(output / f"samples-{slug}-{task}.jsonl", lines)
    atomic_write(output / RESULTS, json.dumps(made, indent=1) + "\n")
    atomic_write(output / TABLE, markdown(made["columns"]))


def _columns(
    columns: Sequence[Subject], names: list[str], manager: Any, settings: Settings, console: Console
) -> Iterator[tuple[str, Any]]:
    """(column, what lm-eval found) one by one; a base is loaded once for all columns that follow each other on it."""
    from .. import models

    loaded: tuple[Any, Any] | None = None
    held = None
    for column in columns:
        if held != column.cfg.model:
            loaded = None  # one model in memory at a time
            _free()
            loaded, held = models.load_model(column.cfg), column.cfg.model
            _to_accelerator(loaded[0])
        assert loaded is not None
        console.print(f"[bold]{column.name}[/bold]: {column.adapter or column.cfg.model.name}", highlight=False)
        yield column.name, _on_base(column, loaded, names, manager, settings)


def _on_base(column: Subject, loaded: tuple[Any, Any], names: list[str], manager: Any, settings: Settings) -> Any:
    """A function of its own, for no name may refer to the model while the next one is loaded."""
    with applied(column, loaded[0]) as model:
        return _score(model, loaded[1], names, manager, settings)


def _free() -> None:
    """Memory of what nothing refers to any more: lm-eval's wrapper and the model refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _score(model: Any, tokenizer: Any, names: list[str], manager: Any, settings: Settings) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    try:
        return lm_eval.simple_evaluate(
            model=wrapped, tasks=names, num_fewshot=settings.num_fewshot, limit=settings.limit, task_manager=manager,
            apply_chat_template=settings.chat, random_seed=settings.seed, numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed, fewshot_random_seed=settings.seed,
            confirm_run_unsafe_code=settings.execute_code,
        )  # fmt: skip
    except (ConnectionError, OSError) as error:
        if "ffline" in str(error) or "connect" in str(error).lower() or "Couldn't reach" in str(error):
            raise UserError(
                f"the data of {', '.join(names)} cannot be reached; local tasks: {', '.join(local.names())}"
            ) from None
        raise


def _figures(result: Mapping[str, Any]) -> Figures:
    """Numbers alone, of tasks and of groups; beside each the number of examples."""
    made: Figures = {}
    counts = {task: n.get("effective") for task, n in (result.get("n-samples") or {}).items()}
    for task, figures in {**result["results"], **(result.get("groups") or {})}.items():
        kept = {key: value for key, value in figures.items() if key not in HIDDEN and isinstance(value, (int, float))}
        made[task] = {**kept, "n": counts.get(task) or figures.get("sample_count") or figures.get("sample_len")}
    groups = result.get("group_subtasks") or {}
    for group, members in groups.items():
        if members and group in made:
            made[group]["n"] = sum(counts.get(task) or 0 for task in _tasks_of(group, groups))
            for member in members:
                if member in made:  # a group without figures of its own has none
                    made[member]["in"] = group
    return made


def _tasks_of(name: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group and of the groups in it, each once; of a task itself."""
    return set().union(*(_tasks_of(member, groups) for member in groups[name])) if groups.get(name) else {name}


def cells(found: Mapping[str, Figures]) -> list[tuple[str, str, Any, dict[str, str]]]:
    """(task, metric, examples, column -> text), members of a group left out."""
    first = next(iter(found.values()))
    made = []
    for task, figures in first.items():
        if "in" in figures:
            continue
        for key in figures:
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            shown = metric if kind == "none" else f"{metric} ({kind})"
            texts = {}
            for column, tasks in found.items():
                value, spread = tasks[task].get(key), tasks[task].get(f"{metric}_stderr,{kind}")
                texts[column] = "-" if value is None else f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
            made.append((task, shown, figures.get("n"), texts))
    return made


def markdown(found: Mapping[str, Figures]) -> str:
    """For reading."""
    lines = [f"| task | metric | n | {' | '.join(found)} |", f"|---|---|---:|{'---:|' * len(found)}"]
    lines += [f"| {t} | {m} | {n} | {' | '.join(texts[c] for c in found)} |" for t, m, n, texts in cells(found)]
    return "\n".join(lines) + "\n\nValue ± standard error over the examples.\n"


def _table(found: Mapping[str, Figures]) -> Table:
    table = Table(title="value ± standard error over the examples", title_justify="left")
    for heading in ("task", "metric", "n", *found):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, metric, count, texts in cells(found):
        table.add_row(task, metric, str(count), *(texts[column] for column in found))
    return table


def _sample(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, answered and wanted, without lm-eval's bookkeeping."""
    return {key: answer.get(key) for key in ("doc_id", "doc", "target", "filter", "filtered_resps", "resps")}


def _manager(folder: str, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=folder, include_defaults=with_defaults)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("speft-train eval needs lm-eval; pip install 'speft-train[eval]'") from None


def _to_accelerator(model: Any) -> None:
    import torch

    if torch.cuda.is_available():
        model.to("cuda")


def _own_folder(paths: Sequence[str]) -> Path | None:
    """A single run keeps its own figures."""
    folder = Path(paths[0])
    return folder / "lm-eval" if len(paths) == 1 and (folder / "config.yaml").is_file() else None


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("lm_eval", "transformers", "torch", "speft-train"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return found


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """Column -> its part of files' names, no two alike."""
    made: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = slug = "".join(c if c.isalnum() or c in "._+-" else "_" for c in name)
        number = 1
        while slug in made.values():
            number += 1
            slug = f"{plain}_{number}"
        made[name] = slug
    return made
