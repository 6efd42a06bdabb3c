"""Peak memory of each rank over a whole run at ZeRO stage 3, stage by stage, beside the size of the model.

    python benchmarks/zero3_memory.py                            2 gloo ranks, a random model of 413 MB in fp32
    python benchmarks/zero3_memory.py --memory-limit 1GB         the pass' sums in one pass: half the targets' fp32 bytes a rank
    python benchmarks/zero3_memory.py --method lora

Targets are all linear layers; texts are short and one at a time, so that weights are nearly all there is.

Each stage (load, evaluate the base, mask, attach, train, save, evaluate) is the high-water mark of resident memory, on the rank
that takes most, above what is resident after the same run of a model of no size in the same processes, which loads all code.
Prints a table; fails when a rank takes more than --within of the model's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "TRANSFORMERS_VERBOSITY": "error"}  # freed blocks go back to the system
# Small models fit below DeepSpeed's thresholds, of what may be whole at once and of what is never cut up.
RAW = {
    "zero_optimization": {
        "stage": 3, "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 1,
        "stage3_param_persistence_threshold": 10_000, "reduce_bucket_size": 1_000_000,
    }
}  # fmt: skip


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """Save a random Llama with a tokenizer of one token a byte; the bytes of its weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), num_hidden_layers=layers, pad_token_id=0, **shape))
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def config_of(folder: Path, name: str, method: str, limit: str) -> Path:
    """Two steps on short texts."""
    rows = [{"question": f"{n}+{n % 7}?", "answer": f"#### {n + n % 7}"} for n in range(10, 30)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = {"method": method, "memory_limit": limit, "targets": "all-linear", "budget": {"density": 0.005, "of": "targets"}}
    adapter["lora"] = {"r": 4}  # half a percent of the model of no size is less than rank 1
    tree = {
        "output_dir": str(folder / f"run-{name}"),
        "model": {"name": str(folder / name), "dtype": "float32"},
        "data": {"train": str(data), "test": str(data), "max_length": 128},
        "adapter": {**adapter, "calibration_examples": 3, "calibration_batch_size": 1},
        "train": {"global_batch_size": 2, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-4},
        "evaluate": {"max_new_tokens": 2, "batch_size": 2, "limit": 3},
        "deepspeed": {"zero_stage": 3, "config": RAW},
    }
    config = folder / f"{name}.json"  # which is YAML too
    config.write_text(json.dumps(tree))
    return config


def rank_of(folder: Path) -> None:
    """One rank: a run of which each stage is measured; prints {stage: bytes}."""
    import gc

    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from speft_train import cli, engine, memory, stages

    torch.set_num_threads(1)
    stop, engine.stop = engine.stop, lambda ranks: None  # the second run needs the process group of the first
    cli.execute(folder / "nothing.json", [], dry_run=False)
    engine.stop = stop
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()
    memory.reset_peak()
    before, peaks = memory.peak_bytes(), dict[str, int]()

    def measured(stage: stages.Stage) -> stages.Stage:
        def work(run: Any) -> Any:
            memory.reset_peak()
            result = stage.work(run)
            peaks[stage.name] = memory.peak_bytes() - before
            return result

        return replace(stage, work=work)

    stages.STAGES = tuple(measured(stage) for stage in stages.STAGES)
    cli.execute(folder / "model.json", [], dry_run=False)
    print("PEAKS " + json.dumps(peaks), flush=True)


def run(folder: Path, layers: int, hidden: int, method: str, limit: str) -> tuple[int, list[dict[str, int]]]:
    """(bytes of the model, for each rank its peaks by stage)."""
    make_model(folder / "nothing", 1, 64)
    size = make_model(folder / "model", layers, hidden)
    for name in ("nothing", "model"):
        config_of(folder, name, method, limit)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, __file__]
    done = subprocess.run(
        [*words, "--folder", str(folder)], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT}
    )
    found = [json.loads(line.split("PEAKS ", 1)[1]) for line in done.stdout.splitlines() if "PEAKS " in line]
    assert len(found) == 2, done.stdout
    return size, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--method", default="sparse")
    parser.add_argument("--memory-limit", default="60MB")
    parser.add_argument("--json", type=Path, help="write the figures of both ranks there too")
    parser.add_argument("--within", type=float, default=0.9)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        rank_of(options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="speft-zero3-") as folder:
        size, ranks = run(Path(folder), options.layers, options.hidden, options.method, options.memory_limit)
    if options.json is not None:
        options.json.write_text(json.dumps({"model": size, "ranks": ranks}) + "\n", encoding="utf-8")
    print(f"model {size / 1e6:,.0f} MB in fp32; two ranks, MB on the rank that takes most\n")
    print("| stage | MB | of the model |\n|---|---|---|")
    for stage in ranks[0]:
        most = max(rank[stage] for rank in ranks)
        print(f"| {stage} | {most / 1e6:,.0f} | {most / size:.0%} |")
    worst = max(max(rank.values()) for rank in ranks)
    if worst > options.within * size:
        sys.exit(f"a rank took {worst / size:.0%} of the model, more than {options.within:.0%}")


if __name__ == "__main__":
    main()
