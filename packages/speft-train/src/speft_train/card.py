"""README.md of the adapter folder: the model card."""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from . import results
from .config import to_yaml
from .context import Run

FAMILIES = {"full": "transformers", "lora": "peft", "pissa": "peft", "dora": "peft"}  # the others: speft
USE = {
    "speft": """```python
import speft_core as sc
adapter = sc.SparseAdapter.load("adapter")     # this folder
with adapter.applied(model):                   # in place; the base's bits are back on exit
    model.generate(...)
```""",
    "peft": """```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "adapter")     # this folder
```""",
    "transformers": """```python
from transformers import AUTO_MODEL
model = AUTO_MODEL.from_pretrained("adapter")     # this folder
```""",
}


AUTO_MODELS = {"sequence_classification": "AutoModelForSequenceClassification"}  # the other tasks: AutoModelForCausalLM


def text(run: Run, found: dict[str, Any] | None = None) -> str:
    """The card; with the figures once there are any."""
    cfg, method = run.cfg, run.cfg.adapter.method
    head: dict[str, Any] = {
        "base_model": cfg.model.name,
        "library_name": FAMILIES.get(method, "speft"),
        "tags": ["speft", method, cfg.adapter.metric] if method == "sparse" else [method],
    }
    if "/" in cfg.data.train and not cfg.data.train.endswith((".jsonl", ".csv", ".json")):
        head["datasets"] = [cfg.data.train]
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {run.folder.path.name}"]
    parts.append(f"`{cfg.model.name}`, adapted by method `{method}` on `{cfg.data.train}`.")
    if found is not None:
        rows = results.figure_rows(found)
        if rows:
            table = ["| | base | adapted |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
            parts += ["## Evaluation", "\n".join(table)]
        parts += ["## Training", "\n".join(f"- {what}: {value}" for what, value in results.fact_rows(found))]
    use = USE[FAMILIES.get(method, "speft")].replace("AUTO_MODEL", AUTO_MODELS.get(cfg.model.task, "AutoModelForCausalLM"))
    parts += ["## Use", use, "## Configuration", f"```yaml\n{to_yaml(cfg)}```"]
    written = "\n\n".join(parts)
    # Tells speft-hub that no person has touched this text, so that publishing may replace it with a full card.
    mark = hashlib.sha256(written.strip().encode()).hexdigest()[:12]
    return f"{written}\n\n<!-- speft:draft {mark} -->\n"
