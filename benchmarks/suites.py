"""The benchmarks themselves, as a table: step_time, memory, swap, growth. Each returns plain rows."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crew import HERE, crew, interleaved, ratios

Rows = list[dict[str, Any]]
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "262144"
}  # freed activations go back to the system at once, so that the peak means something


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run of the benchmarks measures."""

    model: str  #: bundled:..., a folder, wide or tiny
    data: str | None  #: JSON Lines of questions and answers for mask and batch; None: random tokens
    dtypes: tuple[str, ...]  #: fp32, bf16
    rounds: int  #: interleaved rounds
    rows: int  #: sequences of a batch
    length: int  #: tokens of a sequence
    threads: int  #: CPU threads of each worker
    output: Path  #: folder for masks, JSON, tables and plots
    methods: tuple[str, ...]  #: rows of step_time and memory to run; empty: all

    @property
    def about(self) -> dict[str, Any]:
        """What results of one table have in common."""
        return {"model": self.model, "data": self.data, "tokens": f"{self.rows}x{self.length}", "threads": self.threads}

    def spec(self, method: str, dtype: str, **more: Any) -> dict[str, Any]:
        """A worker's orders."""
        base = {"model": self.model, "data": self.data, "rows": self.rows, "length": self.length, "threads": self.threads}
        return base | {"method": method, "dtype": dtype} | more

    def mask(self, metric: str, like_lora_r: int | None = None, **more: Any) -> str:
        """The path of a mask, made in a process of its own when it is not there."""
        spec = self.spec("mask", "fp32", metric=metric, like_lora_r=like_lora_r, **more)
        return str(self.mask_of(spec, "_".join(str(v) for v in (metric, like_lora_r, *more.values()) if v is not None)))

    def mask_of(self, spec: dict[str, Any], label: str) -> Path:
        """The path of the mask that a worker makes of these orders; its name tells them apart."""
        about = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=4).hexdigest()
        path = self.output / f"mask_{label}_{about}.safetensors"
        _run_mask(spec | {"mask": str(path)}, path)
        return path


def contestants(o: Options, dtype: str) -> dict[str, dict[str, Any]]:
    """Name -> orders of the methods compared at 0.45 % of the model (k of LoRA r = 2), and of two more budgets."""
    table: dict[str, Callable[[], dict[str, Any]]] = {
        "floor": lambda: o.spec("floor", dtype),
        "speft": lambda: o.spec("sparse", dtype, mask=o.mask("gradient", 2)),
        "speft random": lambda: o.spec("sparse", dtype, mask=o.mask("random", 2)),
        "speft r8": lambda: o.spec("sparse", dtype, mask=o.mask("gradient", 8)),
        "LoRA r2": lambda: o.spec("lora", dtype, r=2),
        "LoRA r8": lambda: o.spec("lora", dtype, r=8),
        "SHiRA r2": lambda: o.spec("shira", dtype, r=2),
        "full": lambda: o.spec("full", dtype),
    }
    chosen = [n for n in table if not o.methods or n in o.methods or n == "floor"]
    return {n: table[n]() for n in chosen}


def step_time(o: Options) -> Rows:
    """Seconds of a training step, interleaved, as ratios to the floor and to LoRA and SHiRA at equal parameters."""
    rows: Rows = []
    for dtype in o.dtypes:
        specs = contestants(o, dtype)
        with crew(specs) as made:
            times = interleaved(made, list(specs), o.rounds)
            for name, row in ratios(times, "floor").items():
                against = {
                    f"over {other}": row["seconds"] / statistics.median(times[other])
                    for other in ("LoRA r2", "SHiRA r2")
                    if other in times
                }
                rows.append({"dtype": dtype, "method": name, "trainable": made.trainable[name], **row, **against})
    return rows


def memory(o: Options) -> Rows:
    """Bytes saved for backward and the peak resident memory of training, above the floor's; each method alone in its process."""
    rows: Rows = []
    for dtype in o.dtypes:
        found: Rows = []
        for name, spec in contestants(o, dtype).items():
            with crew({name: spec}, MALLOC) as made:
                peak = made.ask(name, "peak")
                found.append({"dtype": dtype, "method": name, "peak": peak, "saved": made.ask(name, "saved")})
        floor = next(r for r in found if r["method"] == "floor")
        for row in found:
            row["peak above floor"] = row["peak"] - floor["peak"]
            row["saved above floor"] = row["saved"] - floor["saved"]
        lora = next((r for r in found if r["method"] == "LoRA r2"), None)
        for row in found:
            for what in ("peak", "saved"):
                if lora is not None and lora[f"{what} above floor"] > 0:
                    row[f"{what} over LoRA r2"] = row[f"{what} above floor"] / lora[f"{what} above floor"]
        rows += found
    return rows


def swap(o: Options) -> Rows:
    """Putting the adapter on and taking it off: seconds, and bits changed after all rounds (1,000 for speft)."""
    rows: Rows = []
    for dtype in o.dtypes:
        specs = {n: s for n, s in contestants(o, dtype).items() if n in ("speft", "LoRA r2")}
        with crew(specs) as made:
            for name in specs:
                found = made.ask(name, f"swap {1000 if name == 'speft' else max(5, o.rounds)}")
                rows.append({"dtype": dtype, "method": name, **found})
        seconds = {r["method"]: r["seconds"] for r in rows if r["dtype"] == dtype}
        if len(seconds) == 2:
            rows[-2]["over LoRA r2"] = seconds["speft"] / seconds["LoRA r2"]
    return rows


def growth(o: Options) -> Rows:
    """Step time over the floor as density (0.05 to 5 %), tokens (256 to 4096) and width grow; fp32, on a random model for width."""
    rows: Rows = []

    def measure(axis: str, at: float, specs: dict[str, dict[str, Any]]) -> None:
        with crew(specs) as made:
            for name, row in ratios(interleaved(made, list(specs), max(3, o.rounds // 2)), "floor").items():
                rows.append({"axis": axis, "at": at, "method": name, "trainable": made.trainable[name], **row})

    densities = {d: o.mask("gradient", density=d) for d in (0.0005, 0.0015, 0.005, 0.015, 0.05)}
    uniform = {d: o.mask("random", density=d) for d in densities}
    specs = {"floor": o.spec("floor", "fp32")}
    for density, mask in densities.items():
        specs[f"gradient {density}"] = o.spec("sparse", "fp32", mask=mask)
        specs[f"random {density}"] = o.spec("sparse", "fp32", mask=uniform[density])
    measure("density", 0.0, specs)
    for row in rows:
        kind, _, density = row["method"].partition(" ")
        row["method"], row["at"] = kind, float(density or 0)
    for tokens in (256, 1024, 4096):
        shape = {"rows": max(1, tokens // 256), "length": min(tokens, 256)}
        pair = {"floor": o.spec("floor", "fp32", **shape), "gradient": o.spec("sparse", "fp32", mask=densities[0.005], **shape)}
        measure("tokens", tokens, pair)
    for width in (256, 512, 1024, 2048):
        wide = {"model": "wide", "data": None, "width": width}
        mask = o.mask_of(o.spec("mask", "fp32", metric="gradient", density=0.005) | wide, f"wide_{width}")
        pair = {"floor": o.spec("floor", "fp32") | wide, "gradient": o.spec("sparse", "fp32", mask=str(mask)) | wide}
        measure("width", width, pair)
    return rows


def wide(o: Options) -> Rows:
    """A wider model (hidden 2048, 4 layers), 8 x 256 tokens: step time over the floor."""
    rows: Rows = []
    wider = {"model": "wide", "data": None, "rows": 8, "length": 256}
    mask = o.mask_of(o.spec("mask", "fp32", metric="gradient", density=0.0045) | wider, "wide")
    for dtype in o.dtypes:
        specs = {
            "floor": o.spec("floor", dtype) | wider,
            "speft": o.spec("sparse", dtype, mask=str(mask)) | wider,
            "LoRA r8": o.spec("lora", dtype, r=8) | wider,
        }
        with crew(specs) as made:
            for name, row in ratios(interleaved(made, list(specs), o.rounds), "floor").items():
                rows.append({"dtype": dtype, "method": name, "trainable": made.trainable[name], **row})
    return rows


def _run_mask(spec: dict[str, Any], path: Path) -> None:
    if not path.is_file():
        subprocess.run([sys.executable, str(HERE / "worker.py"), json.dumps(spec)], check=True, stdout=subprocess.DEVNULL)


SUITES: dict[str, Callable[[Options], Rows]] = {s.__name__: s for s in (step_time, memory, swap, wide, growth)}
