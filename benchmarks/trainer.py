"""Whole runs of a config on one GPU: speft and LoRA, in one process and under DeepSpeed's launcher, on a model of its shape.

    python benchmarks/trainer.py --data DATA/alpaca_en_demo/train.jsonl            configs/qwen2_7b_alpaca.yaml, 20 steps
    python benchmarks/trainer.py --layers 1 --narrow 16 --steps 3 --runs python    a look, on any machine

The model has the published shape, random weights (written to --folder once) and SmolLM2's tokenizer.
Each run is the command that a user gives, in a process of its own, with nothing changed but the model, the data, the number
of steps and, for a smaller model, LoRA's rank (over the same divisor) and as large a k. Seconds a step are the median over
the steps after the second, from the run's own TensorBoard log; peaks and losses are those of its results.json. Weights are
random: losses only show that something is learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import machine, table

ROOT = Path(__file__).parents[1]
RUN = str(ROOT / "packages" / "speft-train" / "run.py")
ALONE = [sys.executable, RUN]
LAUNCHED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", RUN]
TARGETS, RANK = ("q_proj", "k_proj", "v_proj", "o_proj"), 64
LORA = ["adapter.method=lora", f"adapter.lora.r={RANK}", f"adapter.lora.targets=[{','.join(TARGETS)}]"]
RUNS: dict[str, tuple[list[str], list[str]]] = {  # name -> how it is started, overrides
    "python": (ALONE, []),
    "zero2": (LAUNCHED, ["deepspeed.zero_stage=2"]),
    "zero3": (LAUNCHED, ["deepspeed.zero_stage=3"]),
    "lora": (ALONE, LORA),
    "lora-zero2": (LAUNCHED, ["deepspeed.zero_stage=2", *LORA]),
    "lora-zero3": (LAUNCHED, ["deepspeed.zero_stage=3", *LORA]),
}


def shape(name: str, layers: int | None, narrow: int) -> Any:
    """The published configuration, with fewer layers and narrower where asked."""
    import transformers

    from speft_train.architectures import KNOWN

    settings = dict(KNOWN[name])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.hidden_size, config.intermediate_size = config.hidden_size // narrow, config.intermediate_size // narrow
    return config


def lora_size(config: Any, rank: int) -> int:
    """What LoRA of that rank trains on TARGETS."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(rank * sum(m.weight.shape) for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS)


def write_model(folder: Path, config: Any, tokenizer: str) -> None:
    """A checkpoint of that shape with random bf16 weights, and the tokenizer's files beside it; not made twice."""
    import torch
    import transformers

    from speft_core.files import atomic_folder

    if folder.is_dir():
        return
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with atomic_folder(folder, replace=False) as made:
        model.save_pretrained(made, max_shard_size="5GB")
        for file in Path(tokenizer).iterdir():
            if "token" in file.name or file.name == "chat_template.jinja":
                shutil.copyfile(file, made / file.name)


def seconds_a_step(tensorboard: Path) -> float:
    """Median distance of the logged steps, the first two left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tensorboard))
    log.Reload()
    times = [event.wall_time for event in log.Scalars("train/loss")]
    return statistics.median(b - a for a, b in zip(times[1:-1], times[2:], strict=True))


def run(name: str, asked: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One run from an empty folder, and its row."""
    start, overrides = RUNS[name]
    out = asked.folder / f"run-{name}"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(asked.config), f"output_dir={out}", f"model.name={model}", f"train.max_steps={asked.steps}", "train.logging_steps=1"]
    words += ["train.save_strategy=no", "train.eval_strategy=no", "data.validation_from_train=0", "data.test_size=64"]
    if asked.data:
        words += [f"data.train={asked.data}", f"data.test={asked.data.with_name('test.jsonl')}"]
    else:
        words += ["data.train=bundled:word-problems", "data.template=question_answer", "data.train_size=512"]
    words += overrides
    if asked.layers or asked.narrow > 1:  # the config's rank and k are those of the whole model
        rank = max(RANK // asked.narrow, 1)
        words += [f"adapter.budget.k={lora_size(shape(asked.model, asked.layers, asked.narrow), rank)}", f"adapter.lora.r={rank}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = time.perf_counter()
    done = subprocess.run([*start, *words, *asked.set], env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n", flush=True)
        return {"run": name, "error": f"exit code {done.returncode}"}
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    row = {
        "run": name, "trained": found["trainable_parameters"], "ms a step": 1e3 * seconds_a_step(out / "tensorboard"),
        "peak": found["peak_memory_bytes"], "mask s": found["saliency_seconds"], "train s": found["train_seconds"], "all s": wall,
        "loss before": found["base"]["loss"], "loss": found["adapted"]["loss"], "adapter MB": (found["adapter_bytes"] or 0) / 1e6,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Parse, run each, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "qwen2_7b_alpaca.yaml")
    parser.add_argument("--model", default="Qwen/Qwen2-7B", help="whose shape")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--narrow", type=int, default=1, help="divide the widths by this")
    parser.add_argument("--tokenizer", help="folder with a tokenizer's files; default: that of bundled:smollm2-135m")
    parser.add_argument("--data", type=Path, help="rows of the config's template, with test.jsonl beside; default: word problems")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "trainer")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further overrides of the config")
    asked = parser.parse_args()
    if asked.tokenizer is None:
        from speft_train.bundled import folder

        asked.tokenizer = folder("bundled:smollm2-135m")
    model = asked.folder / f"{asked.model.rpartition('/')[2]}-{asked.layers or 'all'}-{asked.narrow}"
    write_model(model, shape(asked.model, asked.layers, asked.narrow), asked.tokenizer)
    rows = [run(name, asked, model) for name in asked.runs]
    print(table(rows))
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({**machine(torch.get_num_threads()), "gpu": gpu}))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
