"""ZeRO stage 3 on two gloo ranks: as stage 2, as one process. Weights are partitioned, so backward must write values again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import speft_core as sc
from pico_run import make_config, make_model
from speft_train import cli, results
from speft_train.folder import RunFolder
from two_ranks import LIGHT, NEEDS_LAUNCHER, as_one_process, end_of, losses, merged, run_all

pytestmark = NEEDS_LAUNCHER

# Pico weights are below the size from which DeepSpeed partitions at all, so the threshold is lowered.
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
STAGE3 = {"deepspeed": {"zero_stage": 3, "config": SHARDED}}
# Clipping divides by a norm that each stage sums in another order; without it nothing but the sharding differs.
PLAIN = merged(LIGHT, {"train": {"max_grad_norm": 0.0}})
BF16 = {"model": {"dtype": "bfloat16"}}
# Three test rows: one rank has two of them, the other one.
UNEVEN: dict[str, Any] = {"data": {"test_size": 3}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    # name: (sections of one process and of two, sections of two alone, a case of two ranks that must end with equal values)
    "stage2": (PLAIN, {"deepspeed": {"zero_stage": 2}}, None),
    "stage3": (PLAIN, STAGE3, None),
    "stage3-kept": (PLAIN, {"deepspeed": {"zero_stage": 3}}, "stage3"),
    "stage3-accumulation": (LIGHT, merged(STAGE3, {"train": {"per_device_train_batch_size": 2}}), None),
    "stage3-checkpointing": (PLAIN, merged(STAGE3, {"train": {"activation_checkpointing": True}}), "stage3"),
    "stage3-dense": ({**LIGHT, "adapter": {"train_dense": ["model.norm"]}}, STAGE3, None),
    "stage3-lora": ({**LIGHT, "adapter": {"method": "lora", "lora": {"r": 2}}}, STAGE3, None),
    "stage3-offload": (PLAIN, merged(STAGE3, {"deepspeed": {"offload_param": "cpu"}}), "stage3"),
    "stage3-dora": ({**LIGHT, "adapter": {"method": "dora", "lora": {"r": 2}}}, STAGE3, None),
    "stage3-pissa": ({**LIGHT, "adapter": {"method": "pissa", "lora": {"r": 2}}}, STAGE3, None),
    "stage3-full": (merged(UNEVEN, {"adapter": {"method": "full"}, "train": {"learning_rate": 1e-4}}), STAGE3, None),
    "stage3-evaluated": (UNEVEN, STAGE3, None),
}
# A bf16 loss moves with the order of its sums: stage 3 is held against stage 2 alone.
WIDE = {"adapter": {"budget": {"density": 0.5, "of": "targets"}}, "train": {"max_steps": 2}}
BF16_CASES = {"bf16-stage2": merged(PLAIN, BF16, CASES["stage2"][1]), "bf16-stage3": merged(PLAIN, BF16, STAGE3)}
# A head of 16 bits beside values in fp32: all that is trained is in fp32, or a flat buffer could not hold it.
SHORT_HEADS = {"head-stage2": {"deepspeed": {"zero_stage": 2}}, "head-stage3": STAGE3}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run by two ranks in a single launch, in two/NAME."""
    model, folder = make_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("ran")
    runs = []
    for name, (both, theirs, _) in CASES.items():
        make_config(folder / f"{name}-1.yaml", model, folder / "one" / name, **both)
        config = make_config(folder / f"{name}-2.yaml", model, folder / "two" / name, **merged(both, theirs))
        runs.append([str(config), []])
    for name, sections in BF16_CASES.items():
        runs.append([str(make_config(folder / f"{name}-2.yaml", model, folder / "two" / name, **sections)), []])
    wide = make_model(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256)
    runs.append([str(make_config(folder / "wide.yaml", wide, folder / "two" / "wide", **merged(LIGHT, WIDE, STAGE3))), []])
    words = ["bad", "good"]
    rows = [{"text": f"{words[n % 2]} " * (n % 5 + 1), "label": words[n % 2]} for n in range(41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = classifier(folder / "rows.jsonl")
    make_config(folder / "labels-1.yaml", model, folder / "one" / "labels", **labelled)
    config = make_config(folder / "labels-2.yaml", model, folder / "two" / "labels", **merged(labelled, STAGE3))
    runs.append([str(config), []])
    for name, sections in SHORT_HEADS.items():
        both = merged(classifier(folder / "rows.jsonl"), {"train": {"max_grad_norm": 0.0}}, BF16, sections)
        runs.append([str(make_config(folder / f"{name}-2.yaml", model, folder / "two" / name, **both)), []])
    return run_all(folder, runs)


def classifier(rows: Path) -> dict[str, Any]:
    """A decoder with a fresh head, on rows of two classes."""
    data = {"train": str(rows), "test": str(rows), "train_size": None, "test_size": None, "max_length": 64}
    return {"model": {"task": "sequence_classification"}, "data": data, "evaluate": {"batch_size": 4, "max_new_tokens": 256}}


def result(ran: Path, name: str) -> dict[str, Any]:
    return results.read(RunFolder(ran / "two" / name))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_sharded_weights_train_as_one_process_does(ran: Path, name: str) -> None:
    """Losses within 1e-5 in fp32 at each step; the same bits on both ranks, and where only the sharding differs."""
    as_one_process(ran, name, list(CASES).index(name))
    same = CASES[name][2]
    if same is not None:
        assert losses(ran / "two" / name) == losses(ran / "two" / same)
        assert result(ran, name)["digest"] == result(ran, same)["digest"]
        masks = [sc.SparsityMask.load(ran / side / name / "mask.safetensors") for side in ("one", "two")]
        assert masks[0] == masks[1] and masks[0].nnz > 0


@pytest.mark.parametrize("names", [("stage2", "stage3"), tuple(BF16_CASES)])
def test_stage_3_is_stage_2_but_for_the_last_bit(ran: Path, names: tuple[str, str]) -> None:
    """Adam's compiled loop rounds the entries at a shard's end otherwise, and the stages cut the values in other places.

    With bf16 weights the values are still trained in float32: both stages give the same losses.
    """
    order = [*CASES, *BF16_CASES]
    for name in names:
        assert end_of(ran, order.index(name))["code"] == 0, (ran / "stderr").read_text()[-3000:]
    assert losses(ran / "two" / names[0]) == pytest.approx(losses(ran / "two" / names[1]), abs=1e-6)
    two, three = (sc.SparseAdapter.load(ran / "two" / name / "adapter") for name in names)
    assert any(bool(delta.values_K.count_nonzero()) for delta in two.deltas.values())
    for name, delta in two.deltas.items():
        other = three.deltas[name]
        assert torch.equal(delta.indices_K, other.indices_K)
        assert torch.allclose(delta.values_K.float(), other.values_K.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["stage3-evaluated", "stage3-full"])
def test_evaluation_is_that_of_one_process(ran: Path, name: str) -> None:
    """Loss and generated answers, of the base and of what was saved; one rank has more to do than the other."""
    cli.execute(ran / f"{name}-1.yaml", [], dry_run=False)
    one, two = results.read(RunFolder(ran / "one" / name)), result(ran, name)
    for figures in ("base", "adapted"):
        assert two[figures]["loss"] == pytest.approx(one[figures]["loss"], abs=1e-5)
        assert two[figures]["count"] == one[figures]["count"] == 3
        told = {e["prompt"]: e["generated"] for e in two[figures]["examples"]}
        assert told and told == {e["prompt"]: e["generated"] for e in one[figures]["examples"] if e["prompt"] in told}
    assert two["adapted"]["loss"] != two["base"]["loss"]


def test_a_classifier_starts_trains_and_scores_as_in_one_process(ran: Path) -> None:
    """Its head is new, the same on both ranks, trained whole and shipped; 41 rows are 21 and 20."""
    as_one_process(ran, "labels", len(CASES) + len(BF16_CASES) + 1)
    one, two = results.read(RunFolder(ran / "one" / "labels")), result(ran, "labels")
    for figures in ("base", "adapted"):
        assert two[figures]["loss"] == pytest.approx(one[figures]["loss"], abs=1e-5)
        assert two[figures]["accuracy"] == one[figures]["accuracy"] and two[figures]["count"] == 41
    adapters = [sc.SparseAdapter.load(ran / side / "labels" / "adapter") for side in ("one", "two")]
    assert torch.allclose(adapters[0].dense["score.weight"], adapters[1].dense["score.weight"], atol=1e-5)


def test_a_head_in_bf16_is_trained_in_fp32_in_shards_too(ran: Path) -> None:
    first = len(CASES) + len(BF16_CASES) + 2
    for place in range(first, first + len(SHORT_HEADS)):
        assert end_of(ran, place)["code"] == 0, (ran / "stderr").read_text()[-3000:]
    two, three = SHORT_HEADS
    assert losses(ran / "two" / two) == pytest.approx(losses(ran / "two" / three), abs=1e-4)
    heads = [sc.SparseAdapter.load(ran / "two" / name / "adapter").dense["score.weight"] for name in SHORT_HEADS]
    assert heads[0].dtype == torch.bfloat16 and torch.allclose(heads[0].float(), heads[1].float(), rtol=2**-6, atol=1e-4)
    for name in SHORT_HEADS:
        assert result(ran, name)["adapted"]["loss"] < result(ran, name)["base"]["loss"]
        state = load_file(ran / "two" / name / "checkpoint-6" / "trainable.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_nothing_exists_for_frozen_weights(ran: Path) -> None:
    """Two moments and a gradient of half the trained scalars on each rank; checkpoints of 14 bytes each and 2 MB a rank."""
    assert end_of(ran, len(CASES) + len(BF16_CASES))["code"] == 0, (ran / "stderr").read_text()[-3000:]
    found = result(ran, "wide")
    k, padding = found["trainable_parameters"], 64
    assert k > 100_000
    assert 4 * k <= found["optimizer_bytes"] <= 4 * k + 8 * padding
    assert 2 * k <= found["gradient_bytes"] <= 2 * k + 4 * padding
    folder = ran / "two" / "wide" / "checkpoint-2"
    assert 12 * k <= sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 2 * (14 * k + 2_000_000)
    shards = [f.stat().st_size for f in folder.rglob("*rank_*_optim_states.pt")]
    assert len(shards) == 2 and max(shards) <= 14 * k / 2 + 1_000_000
