"""What `speft-train eval` evaluates: a run's folder, an adapter's, or a plain checkpoint, each on its base in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import speft_core as sc
from speft_core.errors import UserError

from ..config import RunConfig, from_mapping, load_config

BASE = "base"


@dataclass(frozen=True)
class Subject:
    """One column of the table. adapter: its folder; None for a model as it is."""

    name: str
    cfg: RunConfig
    adapter: Path | None


def subjects(paths: list[str], model: str | None, dtype: str | None) -> list[Subject]:
    """One for each path. `model` names another place of the base. UserError for what cannot be evaluated."""
    made = [_subject(path, model, dtype) for path in paths]
    names = _names([s.name for s in made])
    return [replace(subject, name=name) for subject, name in zip(made, names, strict=True)]


def bases(found: list[Subject]) -> list[Subject]:
    """The base of each adapter, once."""
    made: dict[str, Subject] = {}
    for subject in found:
        if subject.adapter is not None:
            made.setdefault(subject.cfg.model.name, Subject(BASE, subject.cfg, None))
    if len(made) > 1:
        return [replace(s, name=f"{BASE} {name}") for name, s in made.items()]
    return list(made.values())


@contextmanager
def applied(subject: Subject, model: Any) -> Iterator[Any]:
    """The base with the subject's adapter on it; taken off bit for bit on leaving."""
    if subject.adapter is None:
        yield model
        return
    if (subject.adapter / "adapter_model.safetensors").is_file() and not _is_peft(subject.adapter):
        with sc.SparseAdapter.load(subject.adapter).applied(model):
            yield model
        return
    from ..methods import METHODS

    with METHODS[subject.cfg.adapter.method].applied(model, subject.cfg, subject.adapter, 1) as adapted:
        yield adapted


def _subject(path: str, model: str | None, dtype: str | None) -> Subject:
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"{path} must be a run's folder, an adapter's, or a model; there is no such folder")
        return Subject(path, _plain(path, dtype), None)  # a model of the Hub, or bundled
    if (folder / "config.yaml").is_file():
        if not (folder / "adapter").is_dir():
            raise UserError(f"the run {path} has no adapter yet; finish it with speft-train run {path}/config.yaml")
        return Subject(path, _with(load_config(folder / "config.yaml", stored=True), model, dtype), folder / "adapter")
    if (folder / "training_config.yaml").is_file():
        return Subject(path, _with(load_config(folder / "training_config.yaml", stored=True), model, dtype), folder)
    if (folder / "adapter_config.json").is_file():
        if _is_peft(folder):
            raise UserError(f"{path} is a PEFT adapter without a training_config.yaml; merge it into a checkpoint first")
        base = model or sc.SparseAdapter.load(folder).config.base_model_name_or_path
        if base is None:
            raise UserError(f"{path} does not name its base model; give it with --model")
        return Subject(path, _plain(base, dtype), folder)
    if (folder / "config.json").is_file():
        return Subject(path, _plain(path, dtype), None)
    raise UserError(f"{path} must be a run's folder, an adapter's, or a model's; it holds none of their files")


def _is_peft(folder: Path) -> bool:
    import json

    file = folder / "adapter_config.json"
    return not file.is_file() or "peft_type" in json.loads(file.read_text(encoding="utf-8"))


def _plain(model: str, dtype: str | None) -> RunConfig:
    tree = {"output_dir": "unused", "model": {"name": model, "dtype": dtype or "auto"}, "data": {"train": "unused"}}
    return from_mapping({**tree, "adapter": {"method": "full"}})


def _with(cfg: RunConfig, model: str | None, dtype: str | None) -> RunConfig:
    if cfg.model.task != "causal_lm":
        raise UserError(f"lm-eval scores causal models; model.task is {cfg.model.task}, whose figures are in results.json")
    return replace(cfg, model=replace(cfg.model, name=model or cfg.model.name, dtype=dtype or cfg.model.dtype))


def _names(paths: list[str]) -> list[str]:
    """The last part of each path that tells it apart, also from the base's column; `adapter` says nothing."""
    parts = [[part for part in Path(path).parts if part != "adapter"] or [path] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names) and not any(map(_is_bases, names)):
            return names
    return [f"./{path}" if _is_bases(path) else path for path in paths]


def _is_bases(name: str) -> bool:
    """Whether `bases` may give a column this name."""
    return name == BASE or name.startswith(f"{BASE} ")
