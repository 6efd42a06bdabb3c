"""Starting workers, asking them in turn, and the statistics of what they answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Crew:
    """One worker process per named spec; `ask` talks to one of them."""

    def __init__(self, specs: dict[str, dict[str, Any]], environment: dict[str, str] | None = None) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.trainable: dict[str, int] = {}
        for name, spec in specs.items():
            command = [sys.executable, str(HERE / "worker.py"), json.dumps(spec)]
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if os.environ.get("SPEFT_BENCH_QUIET", "1") == "1" else None,
                text=True,
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"} | (environment or {}),
            )
            self.trainable[name] = self._answer(name).get("trainable", 0)  # one loads at a time

    def _answer(self, name: str) -> Any:
        process = self._processes[name]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            complaint = process.stderr.read()[-2000:] if process.stderr else ""
            raise RuntimeError(f"the worker for {name} ended: {complaint}")
        return json.loads(line)

    def ask(self, name: str, command: str) -> Any:
        """The answer of worker `name` to `command`."""
        process = self._processes[name]
        assert process.stdin is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
        return self._answer(name)

    def close(self) -> None:
        """End all workers."""
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
            process.wait(timeout=60)


@contextmanager
def crew(specs: dict[str, dict[str, Any]], environment: dict[str, str] | None = None) -> Iterator[Crew]:
    """A Crew that ends with the block."""
    made = Crew(specs, environment)
    try:
        yield made
    finally:
        made.close()


def interleaved(made: Crew, names: Sequence[str], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Step times of each worker: every round asks all, forwards and backwards in turn, so that drift falls on all alike. An untimed
    step comes first, as in training: a worker that waited has lost caches and pages."""
    for name in names:
        for _ in range(warmup):
            made.ask(name, "step")
    times: dict[str, list[float]] = {n: [] for n in names}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name in names if number % 2 == 0 else list(reversed(names)):
            made.ask(name, "step")
            times[name].append(made.ask(name, "step"))
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Per method: median seconds, the ratio of medians to `base`, and the median and quartiles of the ratios within rounds."""
    found = {}
    for name, values in times.items():
        paired = [a / b for a, b in zip(values, times[base], strict=True)]
        low, _, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else (paired[0],) * 3
        found[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(values) / statistics.median(times[base]),
            "paired": statistics.median(paired),
            "low": low,
            "high": high,
        }
    return found
