"""Two gloo ranks started by the deepspeed launcher, against one plain process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pico_run import make_config, make_model
from speft_train import cli, results
from speft_train.folder import RunFolder

RUN = Path(__file__).parents[2] / "packages" / "speft-train" / "run.py"
MANY = Path(__file__).parent / "many_runs.py"
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None, reason="no launcher"),
]


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(script: Path, *args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Start two ranks and wait for them."""
    command = [*LAUNCHER, free_port(), str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in results.read(RunFolder(folder))["history"] if "loss" in row]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


LIGHT = {"evaluate": {"enabled": False}}
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
    "stage2-evaluated": ({}, {"deepspeed": {"zero_stage": 2}}),
}


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            made[name] = {**made.get(name, {}), **section}
    return made


def test_two_ranks_train_as_one_process_does(tmp_path: Path, model: Path) -> None:
    """Losses within 1e-5 in fp32 at each step; the same bits on both ranks, values and merged weights."""
    runs = []
    for name, (both, theirs) in CASES.items():
        alone = make_config(tmp_path / f"{name}-1.yaml", model, tmp_path / "one" / name, **both)
        cli.execute(alone, [], dry_run=False)
        runs.append([str(make_config(tmp_path / f"{name}-2.yaml", model, tmp_path / "two" / name, **merged(both, theirs))), []])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = launch(MANY, str(tmp_path / "runs.json"))
    told = [json.loads(line.removeprefix("RUN ")) for line in done.stdout.splitlines() if line.startswith("RUN ")]
    assert len(told) == len(CASES), done.stdout[-3000:] + done.stderr[-3000:]
    for (name, _), end in zip(CASES.items(), told, strict=True):
        assert end["code"] == 0, (name, done.stderr[-3000:])
        assert len(end["digests"]) == 2 and len(set(end["digests"])) == 1, name
        one, two = losses(tmp_path / "one" / name), losses(tmp_path / "two" / name)
        assert len(one) == 6 and one[0] != one[-1], name
        assert two == pytest.approx(one, abs=1e-5), name
    one, two = (results.read(RunFolder(tmp_path / side / "stage2-evaluated")) for side in ("one", "two"))
    for figures in ("base", "adapted"):
        assert two[figures]["count"] == one[figures]["count"] == 4
        assert two[figures]["loss"] == pytest.approx(one[figures]["loss"], abs=1e-5)
        assert two[figures]["exact_match"] == one[figures]["exact_match"]
    masks = {(tmp_path / side / "stage2" / "mask.safetensors").read_bytes() for side in ("one", "two")}
    assert len(masks) == 1


def test_optimizer_shards_hold_only_what_is_trained(tmp_path: Path, model: Path) -> None:
    """Checkpoint bytes of each rank: within 14 bytes a trained scalar, and no frozen weight under any name."""
    import torch

    config = make_config(
        tmp_path / "c.yaml", model, tmp_path / "run", deepspeed={"zero_stage": 2}, adapter={"budget": {"k": 2000}}, **LIGHT
    )
    done = launch(RUN, str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    state = tmp_path / "run" / "checkpoint-6" / "global_step6"
    k = results.read(RunFolder(tmp_path / "run"))["trainable_parameters"]
    assert k == 2000
    model_state = torch.load(state / "mp_rank_00_model_states.pt", weights_only=False)
    assert model_state["module"] == {}
    held = 0
    for shard in sorted(state.glob("zero_pp_rank_*_optim_states.pt")):
        optimizer = torch.load(shard, weights_only=False)["optimizer_state_dict"]
        tensors = [t for s in optimizer["base_optimizer_state"]["state"].values() for t in s.values() if t.dim()]
        assert max(t.numel() for t in tensors) <= k // 2 + 8
        held += sum(t.numel() for t in tensors)
    assert 2 * k <= held <= 2 * k + 32  # two moments of each trained scalar, over both ranks


@pytest.mark.parametrize("stage", [0, 2])
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
            os.killpg(job.pid, signal.SIGTERM)
            job.wait(60)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait(10)
    assert job.returncode != 0
    text = log.read_text()
    assert "is saved, the same command goes on from it" in text, text[-3000:]
    assert "Traceback" not in text
    saved = [f.name for f in (tmp_path / "cut").glob("checkpoint-*") if (f / "COMPLETE").is_file()]
    assert len(saved) == 1 and not (tmp_path / "cut" / "adapter").exists()
    runs = [[str(whole), []], [str(cut), []]]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = launch(MANY, str(tmp_path / "runs.json"))
    assert f"resumed from {saved[0]}" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warm start" not in done.stdout
    found = [results.read(RunFolder(tmp_path / name)) for name in ("whole", "cut")]
    assert found[0]["digest"] == found[1]["digest"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def wait_for(ready: Any, job: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until `ready()`; fail when the job ends before."""
    end = time.monotonic() + seconds
    while not ready():
        assert job.poll() is None, "the job ended too early"
        assert time.monotonic() < end, "the job did not get so far"
        time.sleep(0.05)


def test_another_number_of_ranks_starts_warm_and_says_so(tmp_path: Path, model: Path) -> None:
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", deepspeed={"zero_stage": 2}, **LIGHT)
    done = launch(RUN, str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "adapter")
    cli.execute(config, [], dry_run=False)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "resumed from checkpoint-4" in report
    assert "warm start: checkpoint-4 was made by engine deepspeed, zero_stage 2, world_size 2" in report
    assert results.read(RunFolder(tmp_path / "run"))["steps"] == 6


def test_an_error_on_all_ranks_is_one_line(tmp_path: Path, model: Path) -> None:
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run", **LIGHT)
    done = launch(RUN, str(config), "adapter.budget.k=99999999")
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(told) == 1 and told[0].startswith("error: the budget must fit the targets"), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
