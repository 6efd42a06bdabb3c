"""What only the model or the data tell is refused in the load stage, before anything is measured; until then it is taken as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import cli, engine, stages
from speft_train.ranks import Ranks

METHODS = ["sparse", "lora", "pissa", "dora", "full", "head", "bitfit"]
REACHED = "the stage after load"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, dtype=getattr(torch, name)) for name in ("float32", "bfloat16")}


@pytest.fixture(autouse=True)
def only_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, which joins nobody and does not come past the load stage."""

    def work(run: Any) -> Any:
        raise KeyError(REACHED)

    monkeypatch.setattr(engine, "start", lambda section: Ranks())
    rows = tuple(stages.Stage(**{**vars(s), **({} if s.name == "load" else {"work": work})}) for s in stages.STAGES)
    monkeypatch.setattr(stages, "STAGES", rows)
    yield


def execute(folder: Path, base: Path, /, **sections: Any) -> None:
    deepspeed = {"enabled": True, "zero_stage": 2, **sections.pop("deepspeed", {})}
    file = make_config(folder / "run.yaml", base, folder / "run", deepspeed=deepspeed, **sections)
    cli.execute(file, [], dry_run=False)


@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_the_checkpoint_is_the_one_that_counts(tmp_path: Path, models: dict[str, Path], method: str) -> None:
    sections = {"model": {"dtype": "auto"}, "adapter": {"method": method}, "train": {"bf16": True, "use_cpu": True}}
    with pytest.raises(KeyError, match=REACHED):
        execute(tmp_path, models["bfloat16"], **sections)
    ends = (KeyError, REACHED) if method == "full" else (UserError, "cast the base weights for good")
    with pytest.raises(ends[0], match=ends[1]):
        execute(tmp_path, models["float32"], output_dir=str(tmp_path / "other"), **sections)


@pytest.mark.parametrize(
    ("train", "params", "told"),
    [
        ({"num_train_epochs": 3}, {"total_num_steps": 15, "warmup_num_steps": 1}, None),
        ({"warmup_steps": 0.2}, {"total_num_steps": 15, "warmup_num_steps": 3}, None),
        ({"num_train_epochs": 2}, {"total_num_steps": 15},
         "total_num_steps is 15, but by train.num_train_epochs and the size of the training data it is 10; set"),
        ({"num_train_epochs": 2, "warmup_steps": 0.2}, {"warmup_num_steps": 3},
         "warmup_num_steps is 3, but by train.warmup_steps it is 2; set"),
    ],
)  # fmt: skip
def test_a_schedule_is_compared_when_the_data_tell_how_long_it_is(
    tmp_path: Path, models: dict[str, Path], train: dict[str, Any], params: dict[str, Any], told: str | None
) -> None:
    """Forty examples, eight a step."""
    scheduler = {"type": "WarmupDecayLR", "params": params}
    with pytest.raises(UserError if told else KeyError, match=told or REACHED) as error:
        execute(tmp_path, models["float32"], train={"max_steps": -1, **train}, deepspeed={"config": {"scheduler": scheduler}})
    assert "\n" not in str(error.value)
