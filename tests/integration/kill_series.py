"""Kills a run of two ranks at many moments and lets it go on; prints one JSON line a moment.

    python kill_series.py CONFIG FOLDER --moments 20 --seed 0

The parent imports everything once and forks the ranks, as starting a rank takes longer than a run on a pico model. A moment is
a share of the time that the untouched run took, or a place in a save: after which file, in which save. Both ranks get SIGKILL.
Each line: the moment, how far the run had come, and whether values, losses and adapter equal those of the run left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # imported before the fork
import torch
import transformers  # noqa: F401

from speft_train import checkpoints, cli, engine, results, trainer, training  # noqa: F401
from speft_train.folder import RunFolder

WORLD = 2
PLACES = ("before", "values", "optimizer", "all")  # of a save: what is on the disk when the ranks are killed


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def die_in_save(number: int, place: str) -> None:
    """Kill this process in its save of that number, at that place."""
    made = 0
    save = trainer.RunTrainer._save_checkpoint

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return save(self, *args, **kwargs)

    def dies(owner: Any, name: str, at: str, before: bool) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            due = place == at and made == number
            if due and before:
                os.kill(os.getpid(), signal.SIGKILL)
            found = original(*args, **kwargs)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, wrapped)

    trainer.RunTrainer._save_checkpoint = counting  # type: ignore[method-assign]
    dies(trainer.RunTrainer, "save_model", "before", before=True)
    dies(trainer.RunTrainer, "save_model", "values", before=False)
    dies(engine, "save_optimizer", "optimizer", before=False)
    dies(checkpoints, "mark_complete", "all", before=True)


def start(config: str, output: Path, port: str, fault: tuple[int, str] | None) -> list[int]:
    """Fork the ranks; their process ids."""
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        names = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, OMP_NUM_THREADS="1")
        torch.set_num_threads(1)
        with open(output.parent / f"{output.name}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if fault is not None:
            die_in_save(*fault)
        code = 1
        try:
            code = cli.guarded(lambda: cli.execute(Path(config), [f"output_dir={output}"], dry_run=False))
        finally:
            os._exit(code)
    return pids


def wait(pids: list[int], until: float | None = None) -> list[int]:
    """Wait for the ranks; kill them at `until`, or when one of them is dead. Exit codes, negative for a signal."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if (until is not None and time.monotonic() >= until) or any(codes.values()):
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def outcome(output: Path) -> dict[str, Any]:
    """What two equal runs have in common."""
    found = results.read(RunFolder(output))
    history = [[row["step"], row["loss"]] for row in found["history"] if "loss" in row]
    adapter = hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return {"digest": found["digest"], "history": history, "adapter": adapter, "steps": found["steps"]}


def main() -> None:
    """The untouched run, then one killed run a moment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, whole = random.Random(asked.seed), asked.folder / "whole"
    began = time.monotonic()
    assert wait(start(asked.config, whole, free_port(), None)) == [0] * WORLD, (asked.folder / "whole.log").read_text()
    took, wanted = time.monotonic() - began, outcome(whole)
    for number in range(asked.moments):
        output = asked.folder / f"cut-{number}"
        fault = (draw.randint(1, 3), draw.choice(PLACES)) if number % 3 == 1 else None
        at = None if fault else draw.uniform(0.1, 0.95) * took
        killed = wait(start(asked.config, output, free_port(), fault), None if at is None else time.monotonic() + at)
        reached = [f.name for f in checkpoints.found(output)] if output.is_dir() else []
        complete = [f.name for f in checkpoints.complete(output)] if output.is_dir() else []
        codes = wait(start(asked.config, output, free_port(), None))
        found = outcome(output) if codes == [0] * WORLD else {}
        moment = f"in save {fault[0]}, {fault[1]} written" if fault else f"after {at:.1f} s of {took:.1f}"
        row = {"moment": moment, "killed": killed, "checkpoints": reached, "complete": complete, "codes": codes}
        print(json.dumps({**row, "equal": found == wanted}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
