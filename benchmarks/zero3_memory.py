"""Peak memory of each rank over a whole run at ZeRO stage 3, stage by stage, beside the size of the model.

    python benchmarks/zero3_memory.py                            2 gloo ranks, a random model of 405 MB in fp32
    python benchmarks/zero3_memory.py --memory-limit 1GB         the pass' sums in one pass: half the targets' fp32 bytes a rank
    python benchmarks/zero3_memory.py --method lora

Targets are all linear layers.

Each stage (load, evaluate the base, mask, attach, train, save, evaluate) is the high-water mark of resident memory above the
imports, on the rank that takes most. Prints a table; fails when a rank reaches --within of the model's bytes.
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


def config_of(model: Path, output: Path, method: str, limit: str) -> dict[str, Any]:
    """Two steps on short texts, so that weights are nearly all there is."""
    adapter = {"method": method, "memory_limit": limit, "targets": "all-linear", "budget": {"density": 0.005, "of": "targets"}}
    return {
        "output_dir": str(output),
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": "bundled:word-problems", "train_size": 16, "test_size": 3, "max_length": 192},
        "adapter": {**adapter, "calibration_examples": 6, "calibration_batch_size": 2},
        "train": {"global_batch_size": 2, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-4},
        "evaluate": {"max_new_tokens": 2, "batch_size": 2},
        "deepspeed": {"zero_stage": 3, "config": RAW},
    }


def rank_of(config: Path) -> None:
    """One rank: a run of which each stage is measured; prints {stage: bytes above the imports}."""
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    from speft_train import cli, memory, stages
    from speft_train import trainer as _  # noqa: F401

    torch.set_num_threads(1)
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
    cli.execute(config, [], dry_run=False)
    print("PEAKS " + json.dumps(peaks), flush=True)


def run(folder: Path, layers: int, hidden: int, method: str, limit: str) -> tuple[int, list[dict[str, int]]]:
    """(bytes of the model, for each rank its peaks by stage)."""
    size = make_model(folder / "model", layers, hidden)
    config = folder / "run.json"  # which is YAML too
    config.write_text(json.dumps(config_of(folder / "model", folder / "run", method, limit)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, __file__]
    done = subprocess.run(
        [*words, "--config", str(config)], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT}
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
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.config is not None:
        rank_of(options.config)
        return
    with tempfile.TemporaryDirectory(prefix="speft-zero3-") as folder:
        size, ranks = run(Path(folder), options.layers, options.hidden, options.method, options.memory_limit)
    if options.json is not None:
        options.json.write_text(json.dumps({"model": size, "ranks": ranks}) + "\n", encoding="utf-8")
    print(f"model {size / 1e6:,.0f} MB in fp32; two ranks, MB above the imports on the rank that takes most\n")
    print("| stage | MB | of the model |\n|---|---|---|")
    for stage in ranks[0]:
        most = max(rank[stage] for rank in ranks)
        print(f"| {stage} | {most / 1e6:,.0f} | {most / size:.0%} |")
    worst = max(max(rank.values()) for rank in ranks)
    if worst > options.within * size:
        sys.exit(f"a rank took {worst / size:.0%} of the model, more than {options.within:.0%}")


if __name__ == "__main__":
    main()
