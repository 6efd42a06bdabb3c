"""The output folder: whose it is, which stages are done, and with which result.

`config.yaml` is the whole configuration of the run; `stages.json` records each finished stage with the hash of what it
depends on, and what the files that it read held (contents.py). A stage is done when its record has that hash, those files hold the
same, and its own are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from speft_core.errors import UserError
from speft_core.files import atomic_write

from . import contents, engine
from .config import DeepspeedSection, RunConfig, batch_plan, identity_dict, load_config, to_yaml
from .config_checks import unread

CONFIG, RECORD = "config.yaml", "stages.json"
FILES = "files"  # of a stage's record: what it read (contents.py); records of older versions have none
# What a run computes. The deepspeed and evaluate sections say how it is computed and what is measured, but for an optimizer or
# scheduler block.
IDENTITY = ("model", "data", "adapter", "train", "seed")
# Keys of the train section that change speed, memory or what is written, and not what is learned.
NEUTRAL = (
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "disable_tqdm", "include_num_input_tokens_seen", "log_level", "log_level_replica",
    "logging_first_step", "logging_steps", "per_device_eval_batch_size", "report_to", "run_name", "save_steps",
    "save_strategy", "save_total_limit", "torch_empty_cache_steps", "use_cpu",
)  # fmt: skip
# Those of them that say what a run that is steered by its validations can take for the best. Not save_steps: where it could tell, it
# is the steps between two validations (`train_args.steps_to_best`), which count.
VALIDATING = ("save_strategy",)
# Several ways to say how many examples one optimizer step sees.
BATCHES = ("train.global_batch_size", "train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def identity(cfg: RunConfig) -> dict[str, Any]:
    """What makes two runs the same run, as key path -> value."""
    tree, counted = identity_dict(cfg), _counted(cfg)
    tree["train"] = {k: v for k, v in tree["train"].items() if k not in NEUTRAL or k in counted}
    if tree["train"].get("global_batch_size") is not None:
        tree["train"].pop("per_device_train_batch_size", None)
    tree["data"] |= dict.fromkeys(unread(cfg.model.task, cfg.data.template))
    made = {name: tree[name] for name in IDENTITY}
    return dict(_flat(made | {f"deepspeed.config.{name}": block for name, block in contents.blocks(cfg).items()}))


def _counted(cfg: RunConfig) -> tuple[str, ...]:
    """Keys that are neutral in other runs."""
    if not contents.validates(cfg):
        return ()
    by_log = cfg.train.get("eval_strategy") == "steps" and not cfg.train.get("eval_steps")  # as often as it logs
    return (*VALIDATING, "logging_steps") if by_log else VALIDATING


def older(cfg: RunConfig) -> RunConfig:
    """The same run without what older versions did not count: its hashes are those of their records."""
    train = {key: value for key, value in cfg.train.items() if key not in NEUTRAL}
    return replace(cfg, train=train, deepspeed=DeepspeedSection())


class RunFolder:
    """One output folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held: int | None = None  # the open folder, locked, while a run is in it

    def check(self, cfg: RunConfig) -> None:
        """Refuse a folder that holds something else. Nothing is written."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir must be a folder; {self.path} is a file")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        other = "; choose another with output_dir=..., or remove it"
        if not (self.path / CONFIG).is_file():
            raise UserError(f"output_dir {self.path} holds files that are not a run's (no {CONFIG}){other}")
        try:
            found = load_config(self.path / CONFIG, stored=True)
        except UserError as error:
            raise UserError(f"output_dir {self.path} holds a run that cannot be read ({error}){other}") from None
        if self._ended_at_once(found):
            return
        ours = identity(cfg)
        try:
            theirs = identity(found)
        except UserError:  # its DeepSpeed file is gone; what it held is in the records, see `_check_contents`
            theirs = identity(replace(found, deepspeed=cfg.deepspeed))
        differ = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if set(differ) & set(BATCHES) and self._trained_with(cfg):
            differ = [key for key in differ if key not in BATCHES]
        if differ:
            shown = ", ".join(f"{k} is {_show(theirs.get(k))} there and {_show(ours.get(k))} here" for k in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"output_dir {self.path} holds a run of another config ({shown}{more}){other}")

    def _trained_with(self, cfg: RunConfig) -> bool:
        """Whether this unfinished run has a checkpoint, of as many examples a step as this config gives on these processes."""
        from . import checkpoints

        found = checkpoints.complete(self.path)
        if not found or (self.result("save") and (self.path / "adapter").exists()):
            return False
        world = engine.launched_ranks()[1]
        per_device, accumulation = batch_plan(cfg, world)
        return checkpoints.plan(found[-1]).get(checkpoints.BATCH) == per_device * accumulation * world

    def _ended_at_once(self, found: RunConfig) -> bool:
        """Whether a run wrote its config here and nothing else, as one whose data do not exist: any other may follow."""
        alone = [file.name for file in self.path.iterdir()] == [CONFIG]
        return alone and (self.path / CONFIG).read_text(encoding="utf-8") == to_yaml(found)

    def claim(self, cfg: RunConfig) -> contents.Contents:
        """Make the folder this run's until `release`, or until the process ends; what the run's files hold. UserError while another
        run is in it, and where it has trained on what its files hold no more.
        """
        self.check(cfg)
        found = contents.of(cfg)
        self._check_contents(cfg, found)
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        text = to_yaml(cfg)
        file = self.path / CONFIG
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            atomic_write(file, text)
        return found

    def _check_contents(self, cfg: RunConfig, found: Mapping[str, str]) -> None:
        """Refuse to go on with, or to report, values that were trained on other files than there are now. Nothing is written."""
        from . import checkpoints

        trained: dict[str, str] = {}
        if (self.path / "adapter").exists():
            trained |= self.records().get("save", {}).get(FILES, {})
        for checkpoint in checkpoints.complete(self.path)[-1:]:
            trained |= checkpoints.contents(checkpoint)
        differ = [contents.shown(cfg, key) for key in contents.changed(trained, found)]
        if differ:
            raise UserError(
                f"output_dir {self.path} holds a run that was trained before {', '.join(differ)} changed; choose another with"
                " output_dir=..., or put back what it was trained on"
            )

    def _hold(self) -> None:
        """Lock the folder itself, which leaves no file behind; where there is no such lock, do without."""
        if self._held is not None:
            return
        try:
            import fcntl

            folder = os.open(self.path, os.O_RDONLY)
        except (ImportError, OSError):
            return
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise UserError(f"output_dir {self.path} is in use by another run; wait for it, or choose another") from None
        except OSError:  # a shared disk without locks
            os.close(folder)
            return
        self._held = folder

    def release(self) -> None:
        """Let other runs in."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __del__(self) -> None:
        self.release()

    def records(self) -> dict[str, Any]:
        """Stage name -> {"key": ..., "result": ...}."""
        try:
            found = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / RECORD} cannot be read ({error}); remove it to run all stages again") from None
        return found if isinstance(found, dict) else {}

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage has recorded; empty when it has not run."""
        found: dict[str, Any] = self.records().get(stage, {}).get("result", {})
        return found

    def is_done(
        self, stage: str, key: str, files: Sequence[str], found: Mapping[str, str] | None = None, older: str | None = None
    ) -> bool:
        """Whether the stage ran with this key and its files are there. found: what the run's files hold now, to be what the stage
        read. older: a key that a record may have which does not say what was read.
        """
        record = self.records().get(stage)
        if record is None or record.get("key") not in ((key,) if FILES in record else (key, older)):
            return False
        return not contents.changed(record.get(FILES, {}), found or {}) and all((self.path / f).exists() for f in files)

    def finish(self, stage: str, key: str, result: Mapping[str, Any], read: Mapping[str, str] | None = None) -> None:
        """Record a stage; read: what the files held that it depends on."""
        record = {"key": key, "result": dict(result), **({} if read is None else {FILES: dict(read)})}
        atomic_write(self.path / RECORD, json.dumps({**self.records(), stage: record}, indent=1, sort_keys=True) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return rows


def _show(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, default=str)
