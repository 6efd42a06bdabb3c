"""`speft-train sweep`: run the cells of a table, skip those that are done, choose tuned settings on validation data,
and write the table.
"""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from speft_core.errors import UserError
from speft_core.files import atomic_write

from . import contents, results, stages, sweep_curves, sweep_table
from .config import to_yaml
from .folder import RunFolder
from .sweep_config import SCORES, Cell, Sweep, load_sweep

# The child of a parallel sweep.
RUN = "import sys; from speft_train.cli import main; sys.argv = ['speft-train', *sys.argv[1:]]; main()"


@dataclass
class Settings:
    """How the cells are run."""

    lock: Path | None = None  #: held while a cell runs
    jobs: int = 1
    devices: Sequence[str] = ()  #: GPUs; no two runs share one while another is free
    table_only: bool = False  #: run nothing, write the table of what is done
    failed: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """UserError for what cannot all be done."""
        if self.lock is not None and self.jobs > 1:
            raise UserError(f"--lock holds a file for one run at a time, --jobs {self.jobs} asks for several; give one of the two")
        if len(set(self.devices)) < len(self.devices):
            raise UserError(f"--devices must name each GPU once, got {','.join(self.devices)}; --jobs says how many runs there are")
        if self.jobs < len(self.devices):
            raise UserError(
                f"--devices {','.join(self.devices)} has {len(self.devices)} GPUs and --jobs is {self.jobs}: some would idle;"
                f" give --jobs {len(self.devices)}, or fewer devices"
            )

    def check_devices(self) -> None:
        """UserError for a GPU that is not on this machine: its runs would train on the CPU and not say so."""
        if not self.devices:
            return
        import torch

        count = torch.cuda.device_count()
        if not count:
            raise UserError(f"--devices must name GPUs of this machine; got {','.join(self.devices)}, and torch finds none: leave it out")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        known = [str(n) for n in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
        for name in self.devices:
            if name not in known and not name.startswith(("GPU-", "MIG-")):
                raise UserError(f"--devices must name GPUs that can be used here: {', '.join(known)}; got {name}")


class Devices:
    """Hands out GPUs: each run gets the one with the fewest runs on it, so with no more runs than GPUs a free one."""

    def __init__(self, names: Sequence[str]) -> None:
        self._runs = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[str]:
        with self._lock:
            name = min(self._runs, key=lambda n: self._runs[n])
            self._runs[name] += 1
        try:
            yield name
        finally:
            with self._lock:
                self._runs[name] -= 1


def execute(config: Path, overrides: list[str], grid: list[str], seeds: int | None, dry_run: bool, settings: Settings) -> None:
    """One sweep, from its file to its table. A cell that fails is told at the end; the others go on."""
    settings.check()
    console = Console()
    sweep = load_sweep(config, overrides, grid, seeds)
    if dry_run:
        plan(sweep, console)
        return
    if not settings.table_only:
        settings.check_devices()
    chosen = _tuned(sweep, console, settings)
    cells = [
        sweep.cell(row, column, seed, chosen[row, column])
        for seed in sweep.seeds
        for column in sweep.columns
        for row in sweep.rows
        if (row, column) in chosen
    ]
    run_cells(cells, console, settings)
    final = _found(cells)
    sweep_table.write(sweep, final)
    sweep_curves.write(sweep, final, _found(sweep.every_cell()))
    console.print((sweep.folder / sweep_table.MARKDOWN).read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    if settings.failed:
        name, reason = next(iter(settings.failed.items()))
        raise UserError(f"{len(settings.failed)} of {max(len(cells), len(settings.failed))} runs failed; the first, {name}: {reason}")


def _found(cells: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """The finished ones, with their results."""
    return [(cell, found) for cell in cells if (found := figures(cell)) is not None]


def plan(sweep: Sweep, console: Console) -> None:
    """What would be run, with the count of trained parameters of each row."""
    from rich.table import Table

    table = Table(title=f"{sweep.folder}: {len(sweep.seeds)} seeds", title_justify="left")
    for heading in ("column", "row", "model", "k", "runs", "done"):
        table.add_column(heading)
    for column in sweep.columns:
        for row in sweep.rows:
            cells = [sweep.cell(row, column, seed, tuned) for tuned in sweep.candidates(row) for seed in sweep.seeds]
            done = sum(is_done(cell, read=False) for cell in cells)
            k = f"{planned_count(cells[0]):,}"
            table.add_row(column, row, cells[0].cfg.model.name, k, str(len(cells)), str(done))
    console.print(table)
    console.print("Dry run: nothing was loaded, trained or written.", highlight=False)


def planned_count(cell: Cell) -> int:
    """Scalars that a cell would train, heads aside, from the model's configuration alone."""
    from speft_core.targets import resolve_targets

    from . import methods, models

    model = models.meta_model(cell.cfg)
    return methods.trained_count(model, cell.cfg, resolve_targets(model, cell.cfg.adapter.targets))


def is_done(cell: Cell, read: bool = True) -> bool:
    """Whether the last stage of a cell has run with this very config, and (read) on what its files hold now."""
    folder = RunFolder(cell.cfg.output_dir)
    if not folder.path.is_dir():
        return False
    return stages.is_done(stages.STAGES[-1], cell.cfg, folder, contents.of(cell.cfg) if read else None)


def figures(cell: Cell) -> dict[str, Any] | None:
    """results.json of a finished cell."""
    return results.read(RunFolder(cell.cfg.output_dir)) if is_done(cell) else None


def run_cells(cells: Sequence[Cell], console: Console, settings: Settings) -> None:
    """Run what is not done, one after the other here, or `jobs` at once (or on a GPU of their own) in processes of their own."""
    todo = [] if settings.table_only else [cell for cell in cells if not is_done(cell)]
    done = sum(map(is_done, cells))
    if done:
        console.print(f"{done} of {len(cells)} runs are done already", highlight=False)
    devices = Devices(settings.devices) if settings.devices else None
    work: Callable[[tuple[int, Cell]], None] = lambda item: _one(item[1], item[0], len(todo), console, settings, devices)  # noqa: E731
    if settings.jobs == 1:
        for item in enumerate(todo):
            work(item)
        return
    with ThreadPoolExecutor(settings.jobs) as pool:
        list(pool.map(work, enumerate(todo)))


def _one(cell: Cell, place: int, count: int, console: Console, settings: Settings, devices: Devices | None) -> None:
    started = time.perf_counter()
    try:
        with _holding(settings.lock), devices.one() if devices else nullcontext() as device:
            started = time.perf_counter()
            if settings.jobs == 1 and device is None:
                _here(cell)
            else:
                _elsewhere(cell, device)
    except Exception as error:  # a bug, or a full disk, in one cell takes no other with it
        expected = isinstance(error, (UserError, OSError))
        if not expected:
            traceback.print_exc()
        settings.failed[cell.name] = reason = str(error) if expected else f"{type(error).__name__}: {error}"
        console.print(f"[{place + 1}/{count}] {cell.name}: failed: {reason}", highlight=False, markup=False)
    if cell.name in settings.failed:
        gc.collect()  # what it held in cycles, a whole model perhaps, is free before the next one starts
        return
    found = figures(cell) or {}
    shown = found.get("adapted") or {}
    text = ", ".join(f"{name} {shown[name]:.4f}" for name in SCORES if isinstance(shown.get(name), float))
    seconds = time.perf_counter() - started
    console.print(f"[{place + 1}/{count}] {cell.name}: {text} ({seconds:.1f} s)", highlight=False, markup=False)


def _here(cell: Cell) -> None:
    from . import cli, refusals

    refusals.check_run(cell.cfg)
    folder = RunFolder(cell.cfg.output_dir)
    folder.check(cell.cfg)
    cli.run_checked(cell.cfg, folder, Console(file=io.StringIO()))


def _elsewhere(cell: Cell, device: str | None) -> None:
    config = Path(cell.cfg.output_dir).with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(config, to_yaml(cell.cfg))
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "run", str(config)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")


def _tuned(sweep: Sweep, console: Console, settings: Settings) -> dict[tuple[str, str], tuple[tuple[str, Any], ...]]:
    """For each place of the table the candidate with the best validation score, by the first seed; of equal ones (all may
    answer with the majority class) the one with the least validation loss. One alone is chosen without a look: none is run here.
    """
    listed = {(row, column): sweep.candidates(row) for column in sweep.columns for row in sweep.rows}
    cells = [
        sweep.cell(row, column, sweep.seeds[0], tuned)
        for (row, column), several in listed.items()
        if len(several) > 1
        for tuned in several
    ]
    run_cells(cells, console, settings)
    candidates: dict[tuple[str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in cells:
        found = figures(cell)
        if found is None:
            continue
        held = found["adapted"].get("validation") or found["adapted"]
        if held is found["adapted"] and held.get("split") != "validation":
            raise UserError(f"sweep.tune chooses by validation data; {cell.name} found none of its validation rows to measure")
        candidates.setdefault((cell.row, cell.column), []).append((cell, held))
    chosen = {place: several[0] for place, several in listed.items() if len(several) == 1}
    return chosen | {place: _best(sweep, place[1], ran) for place, ran in candidates.items()}


def _best(sweep: Sweep, column: str, ran: Sequence[tuple[Cell, dict[str, Any]]]) -> tuple[tuple[str, Any], ...]:
    name = sweep_table.score_name(sweep, column, (held for _, held in ran))
    ranks = [(sweep_table.goodness(name, held[name]), sweep_table.goodness("loss", held.get("loss", 0.0))) for _, held in ran]
    return ran[ranks.index(max(ranks))][0].tuned


@contextmanager
def _holding(lock: Path | None) -> Iterator[None]:
    """The lock file for as long as a cell runs, so that several sweeps on one machine take turns."""
    if lock is None:
        yield
        return
    import fcntl

    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
