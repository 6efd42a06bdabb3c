"""Two adapters trained apart, one body, one forward: SST-2 and CoLA on a bundled model, through the commands alone.

    python benchmarks/two_heads.py --data DIR          DIR/sst2/{train,test}.jsonl, DIR/cola/{train,validation}.jsonl
    python benchmarks/two_heads.py --data DIR --configs configs/two_heads_smollm2 --out runs/two_heads_smollm2
    python benchmarks/two_heads.py --data DIR --methods sum mean ties --refit 3000

Trains (finished runs in --out are kept), pushes each adapter to a folder registry, makes the two-headed model from the two
repositories, and prints accuracy and Matthews correlation of each task beside those of its own adapter, the time of one
forward beside the base model's (interleaved, medians), and the norm of each change beside that of the weights it changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import speft_core as sc
from speft_core.multihead import load_heads
from speft_train import bundled
from speft_train.config import load_config
from speft_train.evaluate.metrics import figures

ROOT = Path(__file__).parents[1]
TESTS = {"sst2": "test", "cola": "validation"}
Scores = dict[str, dict[str, float]]


def command(*words: str) -> None:
    """One command as a person would type it, shown before it runs."""
    print("$", " ".join(words), file=sys.stderr, flush=True)
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True, stdout=sys.stderr)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def batches(rows: list[dict[str, Any]], tokenizer: Any, size: int = 64) -> list[tuple[Any, list[int]]]:
    """(inputs, labels) of the rows, similar lengths together."""
    ordered = sorted(rows, key=lambda row: len(row["sentence"]))
    cut = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    encode = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [(tokenizer([r["sentence"] for r in part], **encode), [int(r["label"]) for r in part]) for part in cut]


@torch.no_grad()
def scores(answer: Any, parts: list[tuple[Any, list[int]]]) -> dict[str, float]:
    """Accuracy and Matthews correlation of `answer(inputs) -> logits`."""
    outputs = [row for inputs, _ in parts for row in answer(inputs).tolist()]
    return figures([label for _, labels in parts for label in labels], outputs, False)


@torch.no_grad()
def forward_ratio(model: Any, heads: sc.MultiHeadModel, inputs: Any, rounds: int) -> tuple[float, float]:
    """Milliseconds of one forward of the model with its one head, and of the two-headed one, in turn; medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for kept, forward in zip(times, (lambda: model(**inputs), lambda: heads(**inputs)), strict=True):
            start = time.perf_counter()
            forward()
            kept.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0][rounds // 5 :]), statistics.median(times[1][rounds // 5 :])


def train_and_push(data: Path, configs: Path, out: Path, overrides: list[str]) -> dict[str, str]:
    """Train what is not trained yet; the address of each adapter in the folder registry."""
    addresses = {}
    for task, split in TESTS.items():
        files = [f"data.{kind}={data / task / name}.jsonl" for kind, name in (("train", "train"), ("test", split))]
        config = str(configs / f"{task}.yaml")
        command("speft-train", "run", config, *files, f"output_dir={out / task}", *overrides)
        addresses[task] = f"file://{(out / 'hub').resolve()}/me/{task}"
        command("speft-hub", "push", str(out / task / "adapter"), addresses[task], "--license", "apache-2.0")
    return addresses


def alone(model: Any, out: Path, parts: dict[str, Any]) -> Scores:
    """Each task answered by its own adapter."""
    found = {}
    for task in TESTS:
        with sc.SparseAdapter.load(out / task / "adapter").applied(model):
            found[task] = scores(lambda inputs: model(**inputs).logits, parts[task])
    return found


def together(model: Any, folder: Path, parts: dict[str, Any], rounds: int) -> tuple[Scores, tuple[float, float]]:
    """Both tasks answered by the two-headed model, and the time of a forward."""
    with sc.MultiHeadModel.load(folder, model) as heads:
        found = {task: scores(lambda inputs, t=task: heads(**inputs)[t].logits, parts[task]) for task in TESTS}
        return found, forward_ratio(model, heads, parts["sst2"][len(parts["sst2"]) // 2][0], rounds)


@torch.no_grad()
def moved(model: Any, out: Path) -> str:
    """The norm of each adapter's change, over the norm of all the weights that it changes."""
    parameters, told = dict(model.named_parameters()), []
    for task in TESTS:
        deltas = sc.SparseAdapter.load(out / task / "adapter").deltas
        change = torch.stack([delta.values_K.double().norm() for delta in deltas.values()]).norm()
        whole = torch.stack([parameters[name].double().norm() for name in deltas]).norm()
        told.append(f"{task} moves {change:.1f} of {whole:.0f} ({change / whole:.2%})")
    return ", ".join(told)


def features(model: Any, parts: list[tuple[Any, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder's head sees of each row, and the labels."""
    seen: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for inputs, _ in parts:
                model(**inputs)
    finally:
        hook.remove()
    return torch.cat(seen), torch.tensor([label for _, labels in parts for label in labels])


def refitted(folder: Path, out: Path, model: Any, parts: dict[str, Any]) -> Path:
    """The two-headed model in `folder` with heads fitted again, on the merged body: logistic regression, a second a head."""
    body, (heads, kinds) = sc.SparseAdapter.load(folder), load_heads(folder)
    with body.applied(model):
        for task in TESTS:
            x_ND, y_N = features(model, parts[task])
            weight_LD, bias_L = (heads[task][n].clone().requires_grad_() for n in ("classifier.weight", "classifier.bias"))
            optimizer = torch.optim.LBFGS([weight_LD, bias_L], max_iter=200, line_search_fn="strong_wolfe")

            def loss(x_ND=x_ND, y_N=y_N, weight_LD=weight_LD, bias_L=bias_L, optimizer=optimizer) -> torch.Tensor:  # type: ignore[no-untyped-def]
                optimizer.zero_grad()
                found = torch.nn.functional.cross_entropy(x_ND @ weight_LD.T + bias_L, y_N) + 1e-3 * weight_LD.square().sum()
                found.backward()
                return found

            optimizer.step(loss)
            heads[task] = {"classifier.weight": weight_LD.detach(), "classifier.bias": bias_L.detach()}
    shutil.rmtree(out, ignore_errors=True)
    sc.MultiHeadModel(model, None, heads, kinds).save(out)
    body.save(out)
    return out


def main(words: list[str] | None = None) -> None:
    """Parse, train, push, merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/two_heads"))
    parser.add_argument("--configs", type=Path, default=ROOT / "configs/two_heads", help="a folder with sst2.yaml and cola.yaml")
    parser.add_argument("--methods", nargs="+", default=["sum"], help="merge methods, such as sum mean ties")
    parser.add_argument("--refit", type=int, default=0, help="training rows on which an encoder's heads are fitted again")
    parser.add_argument("--rounds", type=int, default=60, help="forwards of each kind that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="key=value for both runs")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    place = bundled.folder(load_config(asked.configs / "sst2.yaml", asked.overrides).model.name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2, pad_token_id=tokenizer.pad_token_id).eval()
    if asked.refit and not hasattr(model, "classifier"):
        parser.error("--refit fits the heads of an encoder; this base has none")
    addresses = train_and_push(asked.data, asked.configs, asked.out, asked.overrides)
    parts = {task: batches(rows_of(asked.data / task / f"{split}.jsonl"), tokenizer) for task, split in TESTS.items()}
    single = alone(model, asked.out, parts)
    print("| body | SST-2 accuracy | Matthews | CoLA accuracy | Matthews | worst change | forward / base |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    show("own adapter", single)
    print(moved(model, asked.out), file=sys.stderr)
    for method in asked.methods:
        folder = asked.out / f"both_{method}"
        shutil.rmtree(folder, ignore_errors=True)
        tasks = [word for task in TESTS for word in ("--task", task)]
        command("speft-hub", "multihead", *addresses.values(), *tasks, "--method", method, "--out", str(folder))
        kept = {f"both, {method}": folder}
        if asked.refit:
            training = {t: batches(rows_of(asked.data / t / "train.jsonl")[: asked.refit], tokenizer) for t in TESTS}
            kept[f"both, {method}, heads fitted again"] = refitted(
                folder, asked.out / f"both_{method}_refitted", model, training
            )
        for name, place in kept.items():
            both, (base_ms, both_ms) = together(model, place, parts, asked.rounds)
            worst = min(100 * (both[t]["accuracy"] - single[t]["accuracy"]) for t in TESTS)
            show(name, both, f"{worst:+.1f}", f"{both_ms / base_ms:.3f} ({both_ms:.1f} / {base_ms:.1f} ms)")


def show(name: str, found: Scores, worst: str = "", ratio: str = "") -> None:
    """One row of the table."""
    figures_shown = [f"{100 * found[task][figure]:.1f}" for task in TESTS for figure in ("accuracy", "matthews")]
    print(f"| {' | '.join([name, *figures_shown, worst, ratio])} |", flush=True)


if __name__ == "__main__":
    main()
