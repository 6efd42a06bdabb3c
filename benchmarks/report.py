"""What was measured, on what: JSON, Markdown tables and plots."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

UNITS = {
    "at": lambda v: f"{v:g}", "seconds": lambda v: f"{v:.4g}", "trainable": lambda v: f"{v:,}", "changed": lambda v: f"{v:,}",
    "elements": lambda v: f"{v:,}",
}  # fmt: skip
START, STOP = "<!-- results -->", "<!-- end of results -->"


def machine(threads: int) -> dict[str, Any]:
    """The processor, what it can do in bf16, and the versions that matter."""
    found: dict[str, Any] = {"threads": threads, "system": platform.system(), "machine": platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        name = re.search(r"model name\s*: (.*)", text)
        flags = (re.search(r"flags\s*: (.*)", text) or [None, ""])[1] or ""
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        found |= {"cpu": name[1] if name else "", "instructions": [f for f in wanted if f in flags.split()]}
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "speft-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    from speft_core.ops import native

    return found | {"versions": versions, "compiled plan": native.reason() or "yes", "torch threads": torch.get_num_threads()}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown; bytes in MB, ratios to three digits."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(c, row.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if column in UNITS:
        return UNITS[column](value)
    if isinstance(value, int) and column.split()[0] in ("peak", "saved"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Bars of step time, and lines of growth; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    if results.get("step_time"):
        rows = results["step_time"]
        dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
        figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.2), squeeze=False)
        for axis, dtype in zip(axes[0], dtypes, strict=True):
            own = [r for r in rows if r["dtype"] == dtype]
            axis.barh([r["method"] for r in own][::-1], [r["ratio"] for r in own][::-1])
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_title(f"step time over the floor, {dtype}")
        figure.tight_layout()
        written.append(folder / "step_time.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    if results.get("growth"):
        rows = [r for r in results["growth"] if r["method"] != "floor"]
        axes_names = list(dict.fromkeys(r["axis"] for r in rows))
        figure, axes = pyplot.subplots(1, len(axes_names), figsize=(4.2 * len(axes_names), 3.2), squeeze=False)
        for axis, name in zip(axes[0], axes_names, strict=True):
            for method in dict.fromkeys(r["method"] for r in rows if r["axis"] == name):
                own = sorted((r["at"], r["ratio"]) for r in rows if r["axis"] == name and r["method"] == method)
                axis.plot(*zip(*own, strict=True), marker="o", label=method)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_xscale("log")
            places = sorted({r["at"] for r in rows if r["axis"] == name})
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.minorticks_off()
            axis.set_xlabel(name)
            axis.set_title("step time over the floor")
            axis.legend()
        figure.tight_layout()
        written.append(folder / "growth.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def described(results: dict[str, Any]) -> str:
    """The machine and the versions, a sentence."""
    about = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    cpu = f"{about.get('cpu', about['machine'])} ({', '.join(about.get('instructions', [])) or 'no vector flags known'})"
    return f"{about['threads']} threads of {cpu}; {versions}; compiled plan: {about['compiled plan']}."


def summary(results: dict[str, Any]) -> str:
    """For README: the methods at equal trainable parameters, side by side; what was not measured is left out."""
    wanted = {
        "step time / floor": ("step_time", "ratio", ""),
        "kept for backward above the floor": ("memory", "saved above floor", " MB"),
        "peak memory above the floor": ("memory", "peak above floor", " MB"),
        "on + off": ("swap", "seconds", " ms"),
        "bits changed by on + off": ("swap", "changed", ""),
    }
    columns = {}
    for title, (suite, key, unit) in wanted.items():
        rows = {(r["dtype"], r["method"]): r[key] for r in results.get(suite, []) if key in r}
        scale = {" MB": 1e-6, " ms": 1e3, "": 1}[unit]
        if rows:
            digits = 0 if unit == " MB" or key == "changed" else 1 if unit else 2
            columns[title] = {place: f"{round(v * scale, digits) + 0.0:,.{digits}f}{unit}" for place, v in rows.items()}  # no -0
    methods = ("speft", "speft random", "LoRA r2", "SHiRA r2", "full")
    places = [(d, m) for d in ("fp32", "bf16") for m in methods if any((d, m) in c for c in columns.values())]
    lines = ["| " + " | ".join(["", "", *columns]) + " |", "|---|---|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join([*place, *(c.get(place, "") for c in columns.values())]) + " |" for place in places]
    return "\n".join(lines) + f"\n\n{described(results)}\n"


def write(results: dict[str, Any], folder: Path) -> str:
    """results.json, results.md and the plots into `folder`; returns the Markdown."""
    parts = [described(results)]
    for name, rows in results.items():
        if isinstance(rows, list) and rows:
            parts.append(f"### {name}\n\n{table(rows)}")
    text = "\n\n".join(parts) + "\n"
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    plots(results, folder)
    return text


def with_pictures(text: str, folder: Path, page: Path) -> str:
    """The tables for a page, and links to the plots of `folder`, which are copied beside it into `pictures/`."""
    drawn = [plot for plot in (folder / "step_time.png", folder / "growth.png") if plot.is_file()]
    for plot in drawn:
        (page.parent / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(plot, page.parent / "pictures" / plot.name)
    return "\n\n".join([text.rstrip(), *(f"![{plot.stem}](pictures/{plot.name})" for plot in drawn)]) + "\n"


def into_docs(text: str, page: Path) -> None:
    """Put the tables between the markers of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(STOP)
    page.write_text(f"{before}{START}\n{text}\n{STOP}{after}", encoding="utf-8")
