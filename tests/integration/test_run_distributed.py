"""Two gloo ranks started by the deepspeed launcher, against one plain process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

import pico
import pico_tokenizers
import speft_core as sc
from pico_run import make_config, make_model, random_masks_digest
from speft_train import cli, results
from speft_train.folder import RunFolder
from two_ranks import LAUNCHER, LIGHT, NEEDS_LAUNCHER, RUN, as_one_process, end_of, free_port, losses, merged, run_all

pytestmark = NEEDS_LAUNCHER


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


MICRO = {"train": {"per_device_train_batch_size": 2}}  # two accumulation steps on two ranks
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (sections of both sides, sections of the distributed side)
    "stage0": (LIGHT, {"deepspeed": {"zero_stage": 0}}),
    "stage1": (LIGHT, {"deepspeed": {"zero_stage": 1}}),
    "stage2": (LIGHT, {"deepspeed": {"zero_stage": 2}}),
    "stage0-accumulation": (LIGHT, {"deepspeed": {"zero_stage": 0}, **MICRO}),
    "stage2-accumulation": (LIGHT, {"deepspeed": {"zero_stage": 2}, **MICRO}),
    "stage2-clipping": ({**LIGHT, "train": {"max_grad_norm": 0.05}}, {"deepspeed": {"zero_stage": 2}}),
    "stage1-checkpointing": (LIGHT, {"deepspeed": {"zero_stage": 1}, "train": {"activation_checkpointing": True}}),
    "stage2-lora": ({**LIGHT, "adapter": {"method": "lora", "lora": {"r": 2}}}, {"deepspeed": {"zero_stage": 2}}),
    "stage1-full": ({**LIGHT, "adapter": {"method": "full"}}, {"deepspeed": {"zero_stage": 1}}),
    "stage2-dense": ({**LIGHT, "adapter": {"train_dense": ["model.norm"]}}, {"deepspeed": {"zero_stage": 2}}),
    "stage2-shards": ({**LIGHT, "adapter": {"budget": {"k": 2000}}}, {"deepspeed": {"zero_stage": 2}}),
    "stage0-dynamic": (
        {**LIGHT, "adapter": {"dynamic": {"interval": 2, "examples": 8}}},
        {"deepspeed": {"zero_stage": 0}, **MICRO},
    ),
    "stage2-evaluated": ({}, {"deepspeed": {"zero_stage": 2}}),
    "stage1-validated": (
        {**LIGHT, "data": {"validation_from_train": 5}, "train": {"eval_strategy": "epoch", "per_device_eval_batch_size": 2}},
        {"deepspeed": {"zero_stage": 1}},
    ),
}


HALF = [("lora", 1), ("dora", 2)]  # a head in 16 bits beside matrices in 32


def classifier(folder: Path) -> dict[str, Any]:
    """Sections of a run on a classifier in bfloat16; the model and its rows are written into the folder."""
    tokenizer = pico_tokenizers.byte_level()
    pico.bert(vocab_size=len(tokenizer), dtype=torch.bfloat16).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    rows = [{"text": "xy"[place % 2] * (1 + place % 5), "label": place % 2} for place in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(folder / "bert"), "dtype": "bfloat16", "task": "sequence_classification"},
        "data": {"train": str(folder / "rows.jsonl"), "train_size": None, "test_size": None, "max_length": 32},
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with every case run by one process (one/NAME) and by two ranks in a single launch (two/NAME)."""
    folder = tmp_path_factory.mktemp("ran")
    runs = []
    for name, (both, theirs) in CASES.items():
        make_config(folder / f"{name}-1.yaml", model, folder / "one" / name, **both)
        config = make_config(folder / f"{name}-2.yaml", model, folder / "two" / name, **merged(both, theirs))
        runs.append([str(config), []])
    runs.append([runs[0][0], ["adapter.budget.k=99999999", f"output_dir={folder / 'two' / 'refused'}"]])
    unset = make_config(folder / "unset.yaml", model, folder / "two" / "unset", **LIGHT, train={"per_device_train_batch_size": 4})
    unset.write_text("".join(line for line in unset.read_text().splitlines(keepends=True) if "global_batch_size" not in line))
    runs.append([str(unset), []])
    sections = classifier(folder)
    for method, stage in HALF:
        name = f"half-{method}-{stage}"
        both = merged(LIGHT, sections, {"adapter": {"method": method, "lora": {"r": 2}}})
        make_config(folder / f"{name}-1.yaml", folder / "bert", folder / "one" / name, **both)
        theirs = merged(both, {"deepspeed": {"zero_stage": stage}})
        runs.append([str(make_config(folder / f"{name}-2.yaml", folder / "bert", folder / "two" / name, **theirs)), []])
    return run_all(folder, runs)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_does(ran: Path, name: str) -> None:
    """Losses within 1e-5 in fp32 at each step; the same bits on both ranks, values and merged weights."""
    end = as_one_process(ran, name, list(CASES).index(name))
    masks = [ran / side / name / "mask.safetensors" for side in ("one", "two")]
    if masks[0].exists():  # safetensors writes its metadata in any order: the files' bytes may differ
        assert sc.SparsityMask.load(masks[0]) == sc.SparsityMask.load(masks[1])
    found = [results.read(RunFolder(ran / side / name)) for side in ("one", "two")]
    validated = [[row["eval_loss"] for row in run["history"] if "eval_loss" in row] for run in found]
    assert bool(validated[0]) == ("validated" in name) and validated[1] == pytest.approx(validated[0], abs=1e-5)
    if "dynamic" in found[0]:
        assert [c["step"] for c in found[1]["dynamic"]["changes"]] == [2, 4]  # no mask after the last step, the sixth
        assert found[1]["dynamic"]["union"] == sc.SparseAdapter.load(ran / "two" / name / "adapter").nnz
    assert end["drawn"] == [random_masks_digest()] * 2, "each rank draws the same random masks for itself"
    for figures in ("base", "adapted"):
        if found[0][figures] is not None:
            assert found[1][figures]["count"] == found[0][figures]["count"] == 4
            assert found[1][figures]["loss"] == pytest.approx(found[0][figures]["loss"], abs=1e-5)
            assert found[1][figures]["exact_match"] == found[0][figures]["exact_match"]


@pytest.mark.parametrize("number", range(len(HALF)))
def test_a_head_in_16_bits_trains_beside_matrices_in_32(ran: Path, number: int) -> None:
    """Stages 1 and 2 lay a group of parameters into one buffer, which has one dtype."""
    name = "half-{}-{}".format(*HALF[number])
    end = end_of(ran, len(CASES) + 2 + number)
    assert end["code"] == 0, (ran / "stderr").read_text()[-3000:]
    assert len(set(end["digests"])) == 1
    cli.execute(ran / f"{name}-1.yaml", [], dry_run=False)
    one, two = losses(ran / "one" / name), losses(ran / "two" / name)
    assert len(one) == 6 and two == pytest.approx(one, abs=0.02)
    saved = safetensors.torch.load_file(ran / "two" / name / "checkpoint-6/trainable.safetensors")
    head = {key: tensor for key, tensor in saved.items() if "modules_to_save" in key}
    assert head and {tensor.dtype for tensor in head.values()} == {torch.bfloat16}
    assert {tensor.dtype for key, tensor in saved.items() if key not in head} == {torch.float32}


def test_optimizer_shards_hold_only_what_is_trained(ran: Path) -> None:
    """Two moments of each trained scalar over both ranks, and no frozen weight under any name."""
    run = ran / "two" / "stage2-shards"
    state = run / "checkpoint-6" / "global_step6"
    k = results.read(RunFolder(run))["trainable_parameters"]
    assert k == 2000
    assert torch.load(state / "mp_rank_00_model_states.pt", weights_only=False)["module"] == {}
    held = 0
    for shard in sorted(state.glob("zero_pp_rank_*_optim_states.pt")):
        optimizer = torch.load(shard, weights_only=False)["optimizer_state_dict"]
        tensors = [t for s in optimizer["base_optimizer_state"]["state"].values() for t in s.values() if t.dim()]
        assert max(t.numel() for t in tensors) <= k // 2 + 8
        held += sum(t.numel() for t in tensors)
    assert 2 * k <= held <= 2 * k + 32


def test_another_number_of_ranks_starts_warm_and_says_so(ran: Path, tmp_path: Path) -> None:
    run = shutil.copytree(ran / "two" / "stage2", tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "adapter")
    cli.execute(ran / "stage2-1.yaml", [f"output_dir={run}"], dry_run=False)
    report = (run / "report.md").read_text()
    assert "resumed from checkpoint-4" in report
    assert "warm start: checkpoint-4 was made by engine deepspeed, zero_stage 2, world_size 2" in report
    found = results.read(RunFolder(run))
    assert found["steps"] == 6
    assert losses(run)[:4] == losses(ran / "two" / "stage2")[:4]


def test_a_batch_that_follows_the_number_of_ranks_is_refused_on_another(ran: Path) -> None:
    """Two ranks of four examples each; told what makes one process see eight, it goes on."""
    assert end_of(ran, len(CASES) + 1)["code"] == 0
    run = ran / "two" / "unset"
    before, told = losses(run), "checkpoint-4 was made with 8 examples a step, 1 process makes it 4, .*; set train.global_batch_size=8"
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "adapter")
    with pytest.raises(sc.UserError, match=told):
        cli.execute(ran / "unset.yaml", [], dry_run=False)
    assert (run / "checkpoint-4" / "COMPLETE").is_file() and not (run / "adapter").exists()
    cli.execute(ran / "unset.yaml", ["train.global_batch_size=8"], dry_run=False)
    assert "warm start" in (run / "report.md").read_text()
    assert len(before) == 6 and losses(run)[:4] == before[:4] and losses(run)[4] == pytest.approx(before[4], abs=1e-5)


def test_an_error_on_all_ranks_is_one_line(ran: Path) -> None:
    assert end_of(ran, len(CASES))["code"] == 2
    told = [line for line in (ran / "stderr").read_text().splitlines() if "error:" in line.lower()]
    assert len(told) == 1 and told[0].startswith("error: the budget must fit the targets")
    assert not (ran / "two" / "refused" / "mask.safetensors").exists()


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.real), 2])
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(tmp_path: Path, model: Path, stage: int) -> None:
    sections = {"deepspeed": {"zero_stage": stage}, "train": {"max_steps": 60, "save_steps": 1000}, **LIGHT}
    whole = make_config(tmp_path / "whole.yaml", model, tmp_path / "whole", **sections)
    cut = make_config(tmp_path / "cut.yaml", model, tmp_path / "cut", **sections)
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [*LAUNCHER, free_port(), str(RUN), str(cut)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        job = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            wait_for(lambda: "step 3/60" in log.read_text(), job)
            ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if "--local_rank" in " ".join(p.cmdline())]
            os.killpg(job.pid, signal.SIGTERM)
            # The launcher passes it on at a time of its own, to one rank after the other: it may come at any moment of their end.
            wait_for(lambda: not [rank for rank in ranks if terminate(rank)], pause=0.001)
            job.wait(60)
            wait_for(lambda: not group_lives(job.pid))  # the launcher's outer process does not wait for the ranks
        finally:
            if group_lives(job.pid):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait(10)
    text = log.read_text()
    assert "is saved, the same command goes on from it" in text, text[-3000:]
    assert "Traceback" not in text and "rank 1" not in text.split("step 3/60")[1]  # one voice for all
    saved = [f.name for f in (tmp_path / "cut").glob("checkpoint-*") if (f / "COMPLETE").is_file()]
    assert len(saved) == 1 and not (tmp_path / "cut" / "adapter").exists()
    run_all(tmp_path, [[str(whole), []], [str(cut), []]])
    said = (tmp_path / "stdout").read_text()
    assert f"resumed from {saved[0]}" in said, said[-3000:] + (tmp_path / "stderr").read_text()[-3000:]
    assert "warm start" not in said
    found = [results.read(RunFolder(tmp_path / name)) for name in ("whole", "cut")]
    assert found[0]["digest"] == found[1]["digest"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def terminate(process: psutil.Process) -> bool:
    """Send SIGTERM, if there is still a process to get it."""
    try:
        process.terminate()
        alive: bool = process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return alive


def group_lives(pid: int) -> bool:
    """Whether any process of the job's group is left."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(ready: Any, job: subprocess.Popen[bytes] | None = None, seconds: float = 240, pause: float = 0.05) -> None:
    """Wait until `ready()`; fail when the job ends before."""
    end = time.monotonic() + seconds
    while not ready():
        assert job is None or job.poll() is None, "the job ended too early"
        assert time.monotonic() < end, "the job did not get so far"
        time.sleep(pause)
