"""The order of the stages, and which of them are skipped. What a stage does is in steps.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from . import contents, shortage, steps
from .config import RunConfig, section_hash
from .contents import Contents, digest
from .context import Run
from .folder import RunFolder, identity, older

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row. A stage that serves others leaves no artifact of its own: it is skipped when they all are done."""

    name: str
    about: str
    work: Callable[[Run], Result]
    depends: Callable[[RunConfig], str]  #: hash of what its result depends on
    reads: Callable[[RunConfig, Contents], Contents] = contents.all_of  #: the files that it depends on too
    wanted: Callable[[RunConfig], bool] = lambda cfg: True
    files: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()


def _of_model(cfg: RunConfig) -> str:
    """Validation data beside the test data are measured of what was trained alone."""
    cfg = replace(cfg, evaluate=replace(cfg.evaluate, validation=False))
    return section_hash(cfg, "model", "data", "evaluate", "seed")


def _of_mask(cfg: RunConfig) -> str:
    return section_hash(cfg, "model", "data", "adapter", "seed")


def _of_training(cfg: RunConfig) -> str:
    return digest(identity(cfg))


def _of_all(cfg: RunConfig) -> str:
    return digest(identity(cfg), section_hash(cfg, "evaluate"))


def _has_mask(cfg: RunConfig) -> bool:
    return cfg.adapter.method == "sparse"


def _evaluates(cfg: RunConfig) -> bool:
    return cfg.evaluate.enabled


def _evaluates_base(cfg: RunConfig) -> bool:
    return cfg.evaluate.enabled and cfg.evaluate.base


STAGES: tuple[Stage, ...] = (
    Stage(name="load", about="model, tokenizer and data", work=steps.load, depends=_of_all,
          serves=("base", "mask", "save", "evaluate")),
    Stage(name="base", about="evaluate the model as it is", work=steps.evaluate_base, depends=_of_model,
          reads=contents.measured, wanted=_evaluates_base),
    Stage(name="mask", about="choose the scalars to train", work=steps.find_mask, depends=_of_mask,
          reads=contents.scored, wanted=_has_mask, files=("mask.safetensors",)),
    Stage(name="attach", about="make them trainable", work=steps.attach, depends=_of_training,
          reads=contents.learned, serves=("save",)),
    Stage(name="train", about="train", work=steps.train, depends=_of_training,
          reads=contents.learned, serves=("save",)),
    Stage(name="save", about="write the adapter folder", work=steps.save, depends=_of_training,
          reads=contents.learned, files=("adapter",)),
    Stage(name="evaluate", about="evaluate what was saved", work=steps.evaluate_adapted, depends=_of_all,
          wanted=_evaluates),
    Stage(name="report", about="results, report, plots", work=steps.report, depends=_of_all,
          files=("results.json", "report.md")),
)  # fmt: skip


def is_done(stage: Stage, cfg: RunConfig, folder: RunFolder, found: Contents | None = None) -> bool:
    """Whether it has run with this config, and on what the run's files hold where that is given. A dry run does not read them."""
    return folder.is_done(stage.name, stage.depends(cfg), stage.files, found, stage.depends(older(cfg)))


def pending(run: Run, only: str | None = None) -> list[str]:
    """Names of the stages that have to run, in order: all, or `only` one and what serves it. Rank 0 looks at the folder."""

    def look() -> list[str]:
        cfg, names = run.cfg, []
        wanted = [stage for stage in STAGES if stage.wanted(cfg)]
        own = {s.name for s in wanted if not s.serves and not is_done(s, cfg, run.folder, run.contents)}
        if only is not None:
            own &= {only}
        for stage in wanted:
            if stage.name in own or own & set(stage.serves):
                names.append(stage.name)
        if own and only is None and "report" not in own:
            names.append("report")  # it tells of the others
        return names

    return run.ranks.on_main(look)


def run_stages(run: Run, only: str | None = None) -> None:
    """Run what is pending, in order, and say what is reused; `only` one stage and what serves it."""
    run.todo = todo = pending(run, only)
    for stage in STAGES:
        if not stage.wanted(run.cfg) or (only is not None and stage.name not in (only, *todo)):
            continue
        if stage.name not in todo:
            if not stage.serves:
                run.say(f"[dim]{stage.name}: reused from {run.folder.path}[/dim]")
            continue
        run.say(f"[bold]{stage.name}[/bold]: {stage.about}")
        started = time.perf_counter()
        with shortage.told(run.cfg, stage.name):
            result = stage.work(run)
        result.setdefault("seconds", round(time.perf_counter() - started, 3))
        read = stage.reads(run.cfg, run.contents)
        run.ranks.on_main(partial(run.folder.finish, stage.name, stage.depends(run.cfg), result, read))
