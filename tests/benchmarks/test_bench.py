"""make bench on a tiny model: every suite runs, its figures add up, and a second run adds to the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


def bench(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "--model", "tiny", "--rounds", "2", "--tokens", "2x16", "--threads", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=check)


@pytest.mark.real  # a minute and a half of imports in workers of their own
def test_step_time_memory_and_swap_on_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    methods = ["--methods", "speft", "LoRA r2"]
    bench("step_time", "swap", "--dtype", "fp32", "--output", str(tmp_path), *methods)
    bench("memory", "--dtype", "fp32", "--output", str(tmp_path), *methods, "SHiRA r2", "full")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"step_time", "memory", "swap", "machine"} <= set(results)
    times = {r["method"]: r for r in results["step_time"]}
    assert set(times) == {"floor", "speft", "LoRA r2"}
    assert times["floor"]["ratio"] == 1.0 and all(r["seconds"] > 0 for r in times.values())
    assert times["speft"]["trainable"] == times["LoRA r2"]["trainable"] > 0 == times["floor"]["trainable"]
    saved = {r["method"]: r["saved above floor"] for r in results["memory"]}
    # Inputs are made again, not kept; the layer of its own even saves a little that a Linear keeps, so below the floor is fine.
    assert saved["floor"] == 0
    assert saved["speft"] < saved["LoRA r2"]
    assert set(saved) == {"floor", "speft", "LoRA r2", "SHiRA r2", "full"} and saved["SHiRA r2"] > 0  # it saves sparse tensors
    swaps = {r["method"]: r for r in results["swap"]}
    assert swaps["speft"]["changed"] == 0 < swaps["speft"]["elements"]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| dtype | method |" in text and "torch" in text
    assert (tmp_path / "step_time.png").stat().st_size > 1000
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->old<!-- end of results -->\nafter\n", encoding="utf-8")
    bench("--tables-only", "--dtype", "fp32", "--output", str(tmp_path), "--readme", str(page))
    short = page.read_text(encoding="utf-8")
    assert short.startswith("before") and short.endswith("after\n") and "old" not in short
    assert f"| speft | {times['speft']['ratio']:.2f} |" in short and "| LoRA r2 |" in short
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


def test_a_page_gets_the_tables_and_the_plots_beside_it(tmp_path: Path) -> None:
    about = {"threads": 1, "machine": "x86_64", "versions": {"torch": "1"}, "compiled plan": "yes"}
    growth = [{"axis": "tokens", "at": at, "method": name, "ratio": 1.1} for at in (256, 1024) for name in ("floor", "gradient")]
    (tmp_path / "results.json").write_text(json.dumps({"machine": about, "growth": growth}), encoding="utf-8")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- results -->old<!-- end of results -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # again: nothing is added twice
        bench("--tables-only", "--output", str(tmp_path), "--docs", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.count("### growth") == 1 == text.count("![growth](pictures/growth.png)") and "old" not in text
    assert (page.parent / "pictures" / "growth.png").stat().st_size > 1000 and "step_time" not in text


def test_tables_of_nothing_are_refused(tmp_path: Path) -> None:
    done = bench("--tables-only", "--output", str(tmp_path), check=False)
    assert done.returncode == 2 and "has no results.json" in done.stderr


def test_results_of_another_model_or_batch_do_not_get_into_one_table(tmp_path: Path) -> None:
    about = {"model": "tiny", "data": "gsm8k/train.jsonl", "tokens": "2x16", "threads": 1}
    (tmp_path / "results.json").write_text(json.dumps({"asked": about}), encoding="utf-8")
    done = bench("step_time", "--output", str(tmp_path), check=False)
    assert done.returncode == 2 and "holds results with data gsm8k/train.jsonl, not bundled:word-problems" in done.stderr
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"asked": about}


def test_an_unknown_suite_is_refused() -> None:
    done = bench("speed", check=False)
    assert done.returncode == 2 and "no suite 'speed'; there are step_time" in done.stderr
