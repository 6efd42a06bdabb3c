"""What `speft-train plan` predicts against what a step takes on this machine: peak memory of sparse and LoRA training.

    python benchmarks/plan_check.py                          SmolLM2-135M and a 1B-shaped random model, two lengths each
    python benchmarks/plan_check.py --models smollm2-135m

Each measurement runs in a process of its own: resident memory after the imports, then the high-water mark of two optimizer
steps above that. fp32 weights, AdamW, every position labelled. Prints a table and fails when a prediction is off by more than
--within.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "TRANSFORMERS_VERBOSITY": "error"}  # freed blocks go back to the system
ONE_B: dict[str, Any] = {  # the published shape of Llama 3.2 1B
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS = {"smollm2-135m": ((4, 128), (4, 512)), "random-1b": ((1, 128), (1, 384))}  # (examples, tokens) of a batch
METHODS = ("sparse", "lora")


def config_of(name: str, method: str, folder: Path) -> Any:
    """The run whose memory is planned: half a percent of all linear layers, or LoRA of as many parameters."""
    from speft_train.config import from_mapping

    where = f"bundled:{name}"
    if name == "random-1b":
        from transformers import LlamaConfig

        where = str(folder)
        LlamaConfig(**ONE_B).save_pretrained(folder)
    adapter = {"method": method, "metric": "magnitude", "targets": "all-linear", "budget": {"density": 0.005, "of": "targets"}}
    tree = {"output_dir": str(folder / "run"), "model": {"name": where, "dtype": "float32"}, "adapter": adapter}
    return from_mapping({**tree, "data": {"train": "bundled:word-problems"}})


def predict(cfg: Any, rows: int, length: int) -> dict[str, int]:
    """The plan's rows for one process without DeepSpeed."""
    from speft_train.planning import Planner, Setting

    return Planner(cfg, cfg.adapter.method, length).rows(0, Setting(length=length, micro=rows), rows)


def measure(cfg: Any, rows: int, length: int) -> int:
    """Bytes that two steps take above the imports."""
    import torch
    import transformers

    import speft_core as sc
    from speft_train import label_rows, memory, methods_peft, models
    from speft_train.methods import budget_of

    torch.manual_seed(0)
    _load_libraries()
    memory.reset_peak()
    before = memory.peak_bytes()
    config = models.load_model_config(cfg)
    if cfg.model.name.startswith("bundled:"):
        model = transformers.AutoModelForCausalLM.from_pretrained(models.locate(cfg.model), dtype=torch.float32)
    else:
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()  # left out with the initialization
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.03, 0.03)
    model.train()
    if cfg.adapter.method == "sparse":
        mask = sc.find_mask(model, metric="magnitude", budget=budget_of(cfg.adapter), targets=cfg.adapter.targets)
        parameters = list(sc.attach(model, mask).parameters())
        called = model
        del mask
    else:
        called = methods_peft.attach(model, cfg, None).model
        parameters = [p for p in called.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (rows, length))
    memory.reset_peak()
    for _ in range(2):
        label_rows.next_token_loss(called, model, {"input_ids": ids, "labels": ids}).backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory.peak_bytes() - before


def _load_libraries() -> None:
    """A step of a model of no size, so that code that is loaded when first used counts as imported."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import speft_core as sc

    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    tuner = sc.attach(tiny, sc.find_mask(tiny, metric="magnitude", budget=sc.Budget(k=100), targets="all-linear"))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-4)
    ids = torch.randint(3, 64, (2, 128))
    tiny(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def child(kind: str, name: str, method: str, rows: int, length: int) -> Any:
    """One prediction or measurement in a process of its own."""
    words = [sys.executable, __file__, "--one", kind, name, method, str(rows), str(length)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """All cases, or one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--within", type=float, default=0.1, help="largest error allowed, as a share of the measured bytes")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, name, method, *sizes = arguments.one
        with tempfile.TemporaryDirectory() as folder:
            cfg = config_of(name, method, Path(folder))
            cfg = replace(cfg, data=replace(cfg.data, max_length=int(sizes[1])))
            print(json.dumps({"predict": predict, "measure": measure}[kind](cfg, *map(int, sizes))))
        return
    worst = 0.0
    print("| model | method | batch | predicted MB | measured MB | error |\n|---|---|---|---|---|---|")
    for name in arguments.models:
        for method in METHODS:
            for rows, length in MODELS[name]:
                planned = sum(child("predict", name, method, rows, length).values())
                taken = child("measure", name, method, rows, length)
                error = planned / taken - 1
                worst = max(worst, abs(error))
                sizes = f"{planned / 1e6:,.0f} | {taken / 1e6:,.0f}"
                print(f"| {name} | {method} | {rows} x {length} | {sizes} | {error:+.1%} |", flush=True)
    print(f"largest error {worst:.1%}, allowed {arguments.within:.0%}")
    if worst > arguments.within:
        sys.exit(1)


if __name__ == "__main__":
    main()
