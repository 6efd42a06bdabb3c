"""The README's Python runs word for word, with speft-core and Transformers alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Makes `import speft_train` and `import speft_hub` fail as they would where only speft-core is installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("speft_train", "speft_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import warnings
warnings.filterwarnings("ignore", message="'pin_memory' argument is set")
import torch
torch.set_num_threads(1)
"""


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


def test_library_snippets_run_in_order_and_undo_themselves(tmp_path: Path) -> None:
    first, second = python_blocks()
    snapshot = "base = {k: v.clone() for k, v in model.state_dict().items()}\n"
    assert "\nids = " in first
    program = BLOCK + first.replace("\nids = ", "\n" + snapshot + "ids = ", 1)
    unchanged = "assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items()), 'bits changed'\n"
    moved = "assert any(bool((d.values_K != 0).any()) for d in adapter.deltas.values()), 'nothing was trained'\n"
    program += unchanged + moved + second.replace("tuner.adapter()", "adapter = tuner.adapter(); adapter", 1)
    program += unchanged + moved + "assert adapter.nnz == mask.nnz == round(0.005 * mask.numel)\nprint('done')\n"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("done")
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
