"""The cells of a sweep: rows and columns of a table, seeds, and settings that are tuned on validation data.

A config file may have a section `sweep`:

    sweep:
      rows:    {gradient: {adapter.metric: gradient}, LoRA: {adapter.method: lora}}    # methods
      columns: {MRPC: {score: accuracy, data.train: ...}, STS-B: {score: pearson, data.train: ...}}    # tasks
      tune:    {train.learning_rate: [1.0e-3, 3.0e-4]}    # the best for each row and column, by validation score
               # a row's own `tune: {train.learning_rate: [...]}` lists other values of these settings for that row
      seeds:   3    # 0, 1, 2; or a list
      vars:    {root: data}    # for ${sweep.vars.root} in the file, set with sweep.vars.root=... on the command line
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from speft_core.errors import UserError, nearest

from .config import SECTIONS, RunConfig, from_mapping
from .config_layers import read_layers, read_value

KEYS = ("rows", "columns", "tune", "seeds", "vars")
# Figures of results.json that a column may show, the first that a run has by default.
SCORES = ("exact_match", "accuracy", "pearson", "matthews", "f1", "spearman", "loss")
LOWER_IS_BETTER = ("loss", "perplexity")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: str
    column: str
    seed: int
    tuned: tuple[tuple[str, Any], ...]
    cfg: RunConfig

    @property
    def name(self) -> str:
        """For the terminal."""
        tuned = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in self.tuned)
        return f"{self.row} on {self.column}{tuned}, seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What is swept over one config."""

    tree: Mapping[str, Any]
    rows: Mapping[str, Settings]
    columns: Mapping[str, Settings]
    seeds: Sequence[int]
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    name: str = "sweep"

    @property
    def folder(self) -> Path:
        """Where the runs and the table go."""
        return Path(self.tree["output_dir"])

    def candidates(self, row: str) -> list[tuple[tuple[str, Any], ...]]:
        """Every combination of the tuned settings, the row's own values first; a single empty one when nothing is tuned."""
        own = self.rows[row].get("tune") or {}
        listed = {key: own.get(key, values) for key, values in self.tune.items()}
        return [tuple(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]

    def score(self, column: str) -> str | None:
        """The figure that a column shows; None for the first of SCORES that a run has."""
        score: str | None = self.columns[column].get("score")
        return score

    def cell(self, row: str, column: str, seed: int, tuned: tuple[tuple[str, Any], ...]) -> Cell:
        """The run of one place in the table, checked."""
        from .measure import may_test  # brings torch

        settings = {k: v for k, v in (*self.columns[column].items(), *self.rows[row].items()) if k not in ("score", "tune")}
        settings |= dict(tuned)
        parts = [column, row, *("-".join((key.rpartition(".")[2], str(value))) for key, value in tuned), f"seed{seed}"]
        folder = self.folder.joinpath(*map(_slug, parts))
        tree = _with(self.tree, {**settings, "seed": seed, "output_dir": str(folder)})
        cfg = from_mapping(tree, f"{self.name} ({row} on {column})")
        # What the choice is made by. A classification always measures it, and a language model without test data.
        chooses = seed == self.seeds[0] and len(self.candidates(row)) > 1
        if chooses and cfg.model.task != "sequence_classification" and may_test(cfg.data):
            cfg = replace(cfg, evaluate=replace(cfg.evaluate, validation=True))
        return Cell(row, column, seed, tuned, cfg)

    def every_cell(self) -> list[Cell]:
        """Each place of the table with every candidate and seed, whether or not it is needed."""
        places = itertools.product(self.columns, self.rows, self.seeds)
        return [self.cell(row, column, seed, tuned) for column, row, seed in places for tuned in self.candidates(row)]

    def all_cells(self) -> list[Cell]:
        """Every run that may be needed, for a dry run."""
        cells = []
        for column, row in itertools.product(self.columns, self.rows):
            cells += [self.cell(row, column, self.seeds[0], tuned) for tuned in self.candidates(row)]
        return cells


def load_sweep(path: Path, overrides: Sequence[str] = (), grid: Sequence[str] = (), seeds: int | None = None) -> Sweep:
    """A sweep from a file's `sweep` section, or from `--grid`; UserError for what cannot be swept."""
    tree = read_layers(path, overrides)
    section = tree.pop("sweep", None) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"{path}: sweep must be a mapping with the keys {', '.join(KEYS)}; got {section!r}")
    for key in section:
        if key not in KEYS:
            raise UserError(f"{path}: sweep.{key}: unknown key.{nearest(key, KEYS)} Known here: {', '.join(KEYS)}")
    axes = dict(_axis(item) for item in grid)
    rows = _kept(section.get("rows")) or {"run": {}}
    if axes:
        rows = {
            _row_name(name if section.get("rows") else "", axes, values): {**settings, **dict(zip(axes, values, strict=True))}
            for name, settings in rows.items()
            for values in itertools.product(*axes.values())
        }
    given = seeds if seeds is not None else section.get("seeds", 1)
    listed = list(range(given)) if isinstance(given, int) else list(given)
    if not listed or not all(isinstance(seed, int) for seed in listed):
        raise UserError(f"{path}: sweep.seeds must be a count of at least 1 or a list of whole numbers; got {given!r}")
    made = Sweep(
        tree=tree, rows=rows, seeds=listed, tune=_flat(section.get("tune") or {}),
        columns=_kept(section.get("columns")) or {"score": {}}, name=str(path),
    )  # fmt: skip
    for column in made.columns:
        score = made.score(column)
        if score not in (None, *SCORES):
            raise UserError(f"{path}: sweep.columns.{column}.score must be one of {', '.join(SCORES)}; got {score!r}")
    _check_tune(path, made)
    _check_figures(path, made)
    return made


def _check_tune(path: Path, made: Sweep) -> None:
    """Candidates are lists; a row's own are of settings that are tuned for all, and rest where nothing is."""
    owned = {f"sweep.rows.{row}.tune": settings.get("tune") or {} for row, settings in made.rows.items()}
    for place, listed in {"sweep.tune": made.tune, **owned}.items():
        if not isinstance(listed, Mapping) or not all(isinstance(values, list) and values for values in listed.values()):
            raise UserError(f"{path}: {place} must map settings to lists of values; got {listed!r}")
        unknown = [key for key in listed if made.tune and key not in made.tune]
        if unknown:
            raise UserError(f"{path}: {place}: {unknown[0]} is not tuned; sweep.tune has {', '.join(made.tune)}")


def _check_figures(path: Path, made: Sweep) -> None:
    """Every run measures something for the table; those that are chosen by it, on validation data."""
    for column, row in itertools.product(made.columns, made.rows):
        candidates = made.candidates(row)
        cfg = made.cell(row, column, made.seeds[0], candidates[0]).cfg
        if not cfg.evaluate.enabled:
            raise UserError(f"{path}: a sweep shows what its runs measure; evaluate.enabled must be true, got false for {row} on {column}")
        if len(candidates) < 2:
            continue
        if cfg.data.validation is None and not cfg.data.validation_from_train:
            raise UserError(
                f"{path}: sweep.tune chooses by validation data: set data.validation or data.validation_from_train; neither is set for"
                f" {row} on {column}"
            )


def _kept(named: Mapping[str, Any] | None) -> dict[str, Settings]:
    """Rows or columns; null takes out one of a base file."""
    return {name: _flat(settings) for name, settings in (named or {}).items() if settings is not None}


def _flat(settings: Any) -> Any:
    """train.learning_rate for what the command line (sweep.tune.train.learning_rate=...) nests under a section's name."""
    if not isinstance(settings, Mapping):
        return settings
    made: Settings = {}
    for key, value in settings.items():
        if key == "tune":
            made[key] = _flat(value)
        elif key in SECTIONS and isinstance(value, Mapping):
            made |= dict(_leaves(key, value))
        else:
            made[key] = value
    return made


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _axis(item: str) -> tuple[str, list[Any]]:
    key, _, text = item.partition("=")
    if not key.strip() or not text.strip():
        raise UserError(f"--grid must look like section.key=value,value; got {item!r}")
    try:
        return key.strip(), list(read_value(f"[{text}]"))
    except yaml.YAMLError:
        raise UserError(f"--grid: {item!r} is not a list of values") from None


def _row_name(row: str, axes: Mapping[str, Any], values: Sequence[Any]) -> str:
    shown = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(axes, values, strict=True))
    return f"{row}, {shown}" if row else shown


def _with(tree: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The tree with dotted keys set; of an exclusive group (the budget) the others are dropped."""
    made: dict[str, Any] = json.loads(json.dumps(tree))
    for key, value in settings.items():
        *path, last = key.split(".")
        place = made
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"sweep: {key} cannot be set, for {part} is {place!r}")
        if path[-2:] == ["adapter", "budget"] and last != "of":
            for unit in ("k", "density", "like_lora_r"):
                place.pop(unit, None)
        place[last] = value
    return made


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_.") or "_"
