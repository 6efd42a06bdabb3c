"""What the task files call: rows of local JSON Lines, and what generated code is worth.

Generated code is run only when ALLOW is set to 1 in the environment, in a process of its own with limits on time, memory and
files, in an empty folder. That stops accidents; it is no sandbox against malice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.sources import read_json_lines

ALLOW = "SPEFT_EXECUTE_CODE"
SECONDS, MEMORY = 10, 4 << 30
# The program comes by stdin; what tells its end is printed after it.
WITHIN_LIMITS = """
import sys
end, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    import resource
    for what, most in (("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 20)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
except ImportError:
    pass
sys.argv[1:] = []
code = sys.stdin.read()
exec(compile(code, "program", "exec"), {"__name__": "__main__"})
print()
print(end)
"""
GENERATED, PASSED = "generated", "pass@1"


def splits(subject: str | None = None, **files: Any) -> dict[str, Any]:
    """Split -> its rows, of JSON Lines files; only those of a `subject`, if there is one."""
    import datasets

    made = {}
    for split, path in files.items():
        if isinstance(path, str) and path.endswith(".jsonl"):  # task metadata come along
            rows = [row for row in read_json_lines(Path(path)) if subject is None or row.get("subject") == subject]
            made[split] = datasets.Dataset.from_list(rows)
    return made


def humaneval_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether prompt and completion pass the problem's tests; without leave to run it, whether there is one."""
    return _results(results[0], f"{doc['prompt']}{results[0]}\n\n{doc['test']}\ncheck({doc['entry_point']})\n")


def mbpp_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the code passes the asserts of the problem; without leave to run it, whether there is one."""
    tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
    return _results(results[0], f"{results[0]}\n\n{tests}\n")


def may_execute() -> bool:
    """Whether the user allowed running what a model wrote."""
    return os.environ.get(ALLOW) == "1"


def _results(completion: str, program: str) -> dict[str, float]:
    if not may_execute():
        return {GENERATED: float(bool(completion.strip()))}
    return {PASSED: float(passes(program))}


def passes(program: str) -> bool:
    """Run a program within the limits; True when it comes to its end, by no exit of its own."""
    end = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="speft-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", WITHIN_LIMITS, end, str(SECONDS), str(MEMORY)], cwd=folder,
                env={"PATH": os.defpath}, input=program.encode(errors="replace"), timeout=SECONDS, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, OSError):
            return False
    return done.returncode == 0 and done.stdout.strip().endswith(end.encode())
