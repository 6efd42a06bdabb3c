"""make bench: speft against the floor, PEFT LoRA, PEFT SHiRA and full fine-tuning. Results as JSON, Markdown and plots.

    python benchmarks/run.py                              everything, on bundled:smollm2-135m
    python benchmarks/run.py step_time --dtype fp32 --data gsm8k/train.jsonl --rounds 12
    python benchmarks/run.py step_time memory swap --model tiny --rounds 2 --dtype fp32   does it run? some minutes
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from models import BUNDLED
from report import into_docs, machine, summary, with_pictures, write
from suites import SUITES, Options


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="speft against the floor, PEFT LoRA, PEFT SHiRA and full fine-tuning")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all when none is named")
    parser.add_argument("--model", default=BUNDLED, help="bundled:smollm2-135m, a folder, wide or tiny")
    parser.add_argument("--data", default="bundled:word-problems", help="or JSON Lines with question and answer, such as GSM8K's")
    parser.add_argument("--dtype", action="append", choices=["fp32", "bf16"], help="may be given twice; both when left out")
    parser.add_argument("--methods", nargs="+", default=[], help="only these rows of step_time, memory and swap")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds (medians are taken)")
    parser.add_argument("--tokens", default="4x256", help="sequences x tokens of a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--docs", type=Path, help="a page that takes the tables between its result markers, with the plots beside it")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing, write what earlier runs found")
    parser.add_argument("--readme", type=Path, help="a page that takes the short table between its result markers")
    found = parser.parse_args(words)
    unknown = [s for s in found.suites if s not in SUITES]
    if unknown:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if found.tables_only and not (found.output / "results.json").is_file():
        parser.error(f"--tables-only writes what an earlier run found; {found.output} has no results.json")
    return found


def main(words: list[str] | None = None) -> None:
    """Run the suites asked for, and add what they find to the results of earlier runs in the same folder."""
    asked = parse(words)
    rows, length = (int(n) for n in asked.tokens.split("x"))
    asked.output.mkdir(parents=True, exist_ok=True)
    options = Options(
        model=asked.model,
        data=asked.data,
        dtypes=tuple(asked.dtype or ("fp32", "bf16")),
        rounds=asked.rounds,
        rows=rows,
        length=length,
        threads=asked.threads,
        output=asked.output,
        methods=tuple(asked.methods),
    )
    earlier = asked.output / "results.json"
    results = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    if not asked.tables_only:
        _require_same(results.setdefault("asked", options.about), options.about, asked.output)
        results["machine"] = machine(asked.threads)
    for name in [] if asked.tables_only else asked.suites or SUITES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        fresh = SUITES[name](options)
        if name in ("step_time", "memory", "swap", "wide"):
            kept = [r for r in results.get(name, []) if r["dtype"] not in options.dtypes]
            fresh = sorted(kept + fresh, key=lambda r: r["dtype"] != "fp32")
        results[name] = fresh
        write(results, asked.output)
    text = write(results, asked.output)
    print(text)
    if asked.docs:
        into_docs(with_pictures(text, asked.output, asked.docs), asked.docs)
    if asked.readme:
        into_docs(summary(results), asked.readme)


def _require_same(earlier: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """One table is of one model and one batch: exit code 2 where the folder holds results of another."""
    for key, value in now.items():
        if earlier.get(key) != value:
            said = f"{output} holds results with {key} {earlier.get(key)}, not {value}; choose another --output"
            print(f"error: {said}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
