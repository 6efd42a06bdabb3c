"""What is in the local files that a run reads, as a hash of each: other content under the same name makes another run.

A file is read to its end for that, once a start, on rank 0 (a sweep: once as long as its size and time of change stay). What
lies on the Hub is known by its name and revision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import engine
from .config import RunConfig
from .train_args import STEERED

Contents = dict[str, str]  # key of the config -> hash of what its file holds

TRAIN, VALIDATION, TEST, MORE_TESTS, MASK = "data.train", "data.validation", "data.test", "data.more_tests", "adapter.mask"
DEEPSPEED = "deepspeed.config"
# The blocks of a DeepSpeed config that say what is learned; the others say how it is computed.
BLOCKS = ("optimizer", "scheduler")


def digest(*parts: Any) -> str:
    """A short hash of plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def blocks(cfg: RunConfig) -> dict[str, Any]:
    """The optimizer and the scheduler that the DeepSpeed config brings. UserError where its file cannot be read."""
    if cfg.deepspeed.config is None or cfg.deepspeed.enabled is False:
        return {}
    made = engine.settings(cfg.deepspeed)
    return {name: made[name] for name in BLOCKS if name in made}


def validates(cfg: RunConfig) -> bool:
    """Whether what is measured while it trains has a say in what ships: it chooses a checkpoint, ends the run or steers its schedule.
    Validations alone do not: they leave figures behind, which may be measured again.
    """
    train = cfg.train
    stops = train.get("load_best_model_at_end") or train.get("early_stopping_patience") is not None
    return bool(stops) or train.get("lr_scheduler_type") in STEERED


def of(cfg: RunConfig) -> Contents:
    """The hash of each local file that is there. One that is gone has none, and is compared with nothing: a finished run
    needs its data no more.
    """
    from .data.sources import READERS, fingerprint  # brings torch: not before the config has been read

    data = cfg.data
    named = {TRAIN: data.train, VALIDATION: data.validation, TEST: data.test}
    named |= {f"{MORE_TESTS}.{name}": place for name, place in data.more_tests.items()}
    files = {key: Path(place).expanduser() for key, place in named.items() if place and Path(place).suffix.lower() in READERS}
    if cfg.adapter.method == "sparse" and cfg.adapter.mask:
        files[MASK] = Path(cfg.adapter.mask)
    made = {key: fingerprint(path) for key, path in files.items() if path.is_file()}
    if isinstance(cfg.deepspeed.config, str) and Path(cfg.deepspeed.config).is_file():
        made[DEEPSPEED] = digest(blocks(cfg))
    return made


def all_of(cfg: RunConfig, found: Mapping[str, str]) -> Contents:
    """Those that any stage reads."""
    return dict(found)


def measured(cfg: RunConfig, found: Mapping[str, str]) -> Contents:
    """Those of the model as it is: all data, as the labels of the training data make a head."""
    return {key: value for key, value in found.items() if key.startswith("data.")}


def scored(cfg: RunConfig, found: Mapping[str, str]) -> Contents:
    """Those that the mask depends on."""
    return {key: value for key, value in found.items() if key in (TRAIN, MASK)}


def learned(cfg: RunConfig, found: Mapping[str, str]) -> Contents:
    """Those that the values depend on."""
    keys = {TRAIN, MASK, DEEPSPEED} | ({VALIDATION} if validates(cfg) else set())
    return {key: value for key, value in found.items() if key in keys}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Keys whose file holds something else now; what only one of the two knows has not changed."""
    return [key for key, value in before.items() if now.get(key, value) != value]


def shown(cfg: RunConfig, key: str) -> str:
    """A key of `learned` with its file."""
    places = {TRAIN: cfg.data.train, VALIDATION: cfg.data.validation, MASK: cfg.adapter.mask}
    return f"{key} ({places[key]})" if key in places else f"the optimizer or scheduler of {key} ({cfg.deepspeed.config})"
