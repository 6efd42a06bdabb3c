"""GB a GPU for models of 0.5B to 405B parameters, by `speft-train plan`; writes the table into a page.

    python benchmarks/plan_table.py [--docs docs/scaling.md]

bf16 weights, 1 x 1024 tokens, activation checkpointing, eight GPUs; k is half a percent of all linear layers, LoRA has as many.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

GB = 1e9
STAGES, GPUS, LENGTH = (2, 3), 8, 1024
# name -> (hidden, intermediate, layers, heads, key and value heads, vocabulary, embeddings tied), as published
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "Qwen2 0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2 1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Qwen2 7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Qwen2.5 32B": (5120, 27648, 64, 40, 8, 152064, False),
    "Llama 3 70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Llama 3.1 405B": (16384, 53248, 126, 128, 8, 128256, False),
}


def config_of(shape: tuple[int, int, int, int, int, int, bool], folder: Path) -> Any:
    """A run on a model of that shape."""
    from speft_train.config import from_mapping

    hidden, inner, layers, heads, kv, vocabulary, tied = shape
    fields = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return from_mapping(
        {
            "output_dir": "run",
            "model": {"name": str(folder), "dtype": "bfloat16"},
            "data": {"train": "bundled:word-problems", "max_length": LENGTH},
            "adapter": {"calibration_batch_size": 1, "budget": {"density": 0.005, "of": "targets"}, "targets": "all-linear"},
            "train": {"activation_checkpointing": True},
        }
    )


def rows() -> list[str]:
    """The table in Markdown."""
    from speft_train.planning import METHODS, Planner, Setting

    setting = Setting(gpus=GPUS, length=LENGTH, memory=10**15)  # as much as is asked for
    heads = [f"{method}, stage {stage}" for method in METHODS for stage in STAGES]
    found = [
        "| model | weights GB | k million | adapter MB | " + " | ".join(heads) + " | mask, stage 2 | mask, stage 3 |",
        "|---|" + "---:|" * (len(heads) + 5),
    ]
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            cfg = config_of(shape, Path(folder))
            planners = {method: Planner(cfg, method, LENGTH) for method in METHODS}
            peaks = [planners[m].peak(s, setting, 1) / GB for m in METHODS for s in STAGES]
            sparse = planners["sparse"]
            start = f"| {name} | {sparse.weights / GB:.1f} | {sparse.k / 1e6:.1f} | {sparse.adapter_bytes() / 1e6:,.0f} | "
            cells = " | ".join(f"{p:,.1f}" for p in peaks)
            masks = " | ".join(f"{sparse.mask_peak(s, setting) / GB:,.1f}" for s in STAGES)
            found.append(f"{start}{cells} | {masks} |")
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path)
    asked = parser.parse_args()
    table = "\n".join(rows())
    if asked.docs:
        before, rest = asked.docs.read_text(encoding="utf-8").split("<!-- plan table -->")
        after = rest.split("<!-- end of plan table -->")[1]
        asked.docs.write_text(f"{before}<!-- plan table -->\n{table}\n<!-- end of plan table -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
