"""The command line as a person uses it: what it prints, as text and as JSON, and how it exits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
from hub.helpers import pico_adapter
from hub.loopback import LoopbackHub
from speft_core import MultiHeadModel, SparseAdapter
from speft_hub.cli import app
from speft_hub.console import run


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in this process; UserErrors must be one line and no traceback."""

    def call(*arguments: object, code: int = 0) -> Said:
        got = run(app, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert got == code, (got, out, err)
        if code == 2:
            assert "Traceback" not in err
        return Said(got, out, err)

    return call


def test_a_first_tour(cli: Any, tmp_path: Path) -> None:
    """push, pull, inspect, verify, merge, multihead, list, history, diff: the README's order, in folders."""
    for i, task in enumerate(("sst2", "cola")):
        pico_adapter(seed=i).save(tmp_path / task)
        said = cli("push", tmp_path / task, f"file://{tmp_path}/reg/alice/{task}", "--tag", "v1", "--license", "mit", "--json")
        assert len(said.json["sha"]) == 40 and "adapter_config.json" in said.json["changed"]
    repo = f"file://{tmp_path}/reg/alice/sst2"
    assert "@" in cli("push", tmp_path / "sst2", repo).out
    assert cli("pull", f"{repo}@v1", tmp_path / "copy", "--json").json["fetched"] is True
    assert "was there already" in cli("pull", f"{repo}@v1", tmp_path / "copy").out
    assert cli("inspect", repo, "--json").json["parameters"] == 40
    assert "40 of 288" in cli("inspect", tmp_path / "copy").out
    assert cli("verify", repo).out.startswith("ok: 40 parameters")
    both = [repo, f"file://{tmp_path}/reg/alice/cola@v1"]
    merged = cli("merge", *both, "--method", "ties", "--density", "0.5", "--out", tmp_path / "both", "--json").json
    assert merged["figures"]["nnz"] == [40, 40] and 0 < merged["figures"]["merged"] <= 40
    provenance = SparseAdapter.load(tmp_path / "both").config.extra["merge"]
    assert [s["name"].partition("@")[0] for s in provenance["sources"]] == ["alice/sst2", "alice/cola"] and len(
        provenance["sources"][0]["name"]
    ) == 23
    assert (
        "Merged by" in (tmp_path / "both/README.md").read_text()
        and str(tmp_path) not in (tmp_path / "both/adapter_config.json").read_text()
    )
    assert "sign conflicts" in cli("merge", *both, "-o", tmp_path / "both", "--force").out
    said = cli("multihead", *both, "--out", tmp_path / "many", "--json")
    assert said.json["heads"] == {"sst2": "classification", "cola": "classification"}
    cli("push", tmp_path / "many", f"file://{tmp_path}/reg/alice/many")
    assert "cola: classification" in cli("inspect", f"file://{tmp_path}/reg/alice/many").out
    listed = cli("list", f"file://{tmp_path}/reg", "--json").json
    assert [r["repo"].rsplit("/", 1)[1] for r in listed] == ["cola", "many", "sst2"] and listed[0]["base_model"] == "acme/pico"
    assert "acme/pico" in cli("list", f"file://{tmp_path}/reg").out
    assert "initial commit" in cli("history", repo).out and cli("history", repo, "--json").json["tags"].keys() == {"v1"}
    rows = cli("diff", tmp_path / "sst2", tmp_path / "cola", "--json").json
    assert len(rows) == 2 and rows[0]["kept"] == [20, 20]
    assert "README.md" in cli("card", tmp_path / "sst2", "--repo", "alice/sst2", "--license", "mit").out


def test_the_same_against_the_hub(cli: Any, hub: LoopbackHub, tmp_path: Path) -> None:
    pico_adapter().save(tmp_path / "a")
    cli("push", tmp_path / "a", "alice/sst2", "--private", "--branch", "dev")
    assert cli("pull", "alice/sst2@dev", tmp_path / "copy").code == 0
    cli("push", tmp_path / "a", "alice/sst2")
    assert cli("list", "alice", "--json").json[0]["private"] is True
    assert "private" in cli("list", "alice").out and "sst2" in cli("history", "alice/sst2").out + "sst2"


def test_multi_head_of_real_models_from_two_repositories(cli: Any, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = pico.llama().config
    config.num_labels = 2
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    import speft_core as sc

    heads = {}
    for seed, task in enumerate(("sst2", "cola")):
        mask = sc.find_mask(model, None, metric="random", budget=sc.Budget(k=100), targets="all-linear", seed=seed)
        tuner = sc.attach(model, mask, train_dense=["score"])
        with torch.no_grad():
            for values in tuner.values.values():
                values.normal_(generator=torch.Generator().manual_seed(seed))
            for dense in tuner.dense.values():
                dense.add_(0.1 * (seed + 1))
        tuner.adapter().save(tmp_path / task)
        tuner.detach()
        heads[task] = SparseAdapter.load(tmp_path / task)
        cli("push", tmp_path / task, f"file://{tmp_path}/r/me/{task}")
    cli("multihead", f"file://{tmp_path}/r/me/sst2", f"file://{tmp_path}/r/me/cola", "-o", tmp_path / "many")
    cli("verify", tmp_path / "many", "--base", tmp_path / "base")
    batch = {k: v for k, v in pico.batch(pico.llama()).items() if k != "labels"}
    with MultiHeadModel.load(tmp_path / "many", model) as many, torch.no_grad():
        answers = many(**batch)
    merged = sc.merge([heads["sst2"], heads["cola"]])
    for task in heads:
        with SparseAdapter(merged.deltas, heads[task].dense, merged.config).applied(model), torch.no_grad():
            assert torch.equal(answers[task].logits, model(**batch).logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pull", "nonsense"], "a repository is written"),
        (["inspect", "nowhere/at/all"], "no adapter at"),
        (["verify", "{a}", "--base", "nowhere"], "--base must be a folder"),
        (["merge", "{a}", "--out", "{a}"], "holds another adapter"),
        (["merge", "{a}", "--out", "{t}/x", "--method", "tie"], "Did you mean 'ties'"),
        (["merge", "{a}", "--out", "{t}/x", "--method", "weighted", "--weights", "a,b"], "--weights must be numbers"),
        (["merge", "{a}", "--out", "{t}/x", "--dtype", "int8"], "dtype must be"),
        (["multihead", "{a}", "{a}", "--out", "{t}/x"], "one distinct name"),
        (["multihead", "{a}", "--task", "../x", "--out", "{t}/x"], "task's name"),
        (["push", "{t}/none", "file://{t}/r/x"], "is no folder"),
        (["push", "{a}", "file://{t}/r/x", "--keep", "both"], "--keep must be"),
        (["push", "{a}", "file://{t}/r/x", "--license", "nonsense"], "license must be"),
        (["push", "{a}", "file://{t}/r/x", "--results", "{t}/none.json"], "there is no file"),
        (["push", "{a}", "file://{t}/r/x", "--parent", "abcdef0"], "not found"),
        (["push", "{a}", "file:///"], "/ exists and is no registry"),
        (["export", "{a}", "{t}/x", "--base", "{t}/none"], "a base is a folder"),
        (["convert", "{a}", "{t}/x"], "speft adapter already"),
        (["convert", "{a}", "{t}/x", "--to", "lora"], "--to must be"),
        (["convert", "{t}/b", "{t}/x", "--against", "{t}/b", "--to", "shira"], "--against makes a speft adapter, got --to shira"),
        (["convert", "{t}/b", "{t}/x", "--against", "{t}/b", "--base", "{t}/b"], "--base has no use with --against"),
        (["convert", "{a}", "{t}/x", "--to", "shira", "--top-k", "3"], "--top-k has no use without --against"),
        (["convert", "{a}", "{t}/x", "--to", "shira", "--base-model", "a/b"], "--base-model has no use without --against"),
        (["diff", "{t}", "{t}"], "no .safetensors"),
        (["history", "file://{t}/none/x"], "not found"),
        (["list", "file://relative"], "file:///absolute"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(
    cli: Any, tmp_path: Path, adapter_dir: Path, arguments: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))  # not even an empty repository is made
    said = cli(*(a.format(a=adapter_dir, t=tmp_path) for a in arguments), code=2)
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["pul"], ["pull"], ["merge", "--nope"], ["pull", "a/b", "--max-bytes", "many"]])
def test_unknown_commands_and_options_exit_with_2(cli: Any, arguments: list[str]) -> None:
    assert cli(*arguments, code=2).err


def test_a_full_disk_is_an_error_not_a_traceback(
    cli: Any, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("push", adapter_dir, f"file://{tmp_path}/r/x")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr("speft_hub.pulling._fetch", full)
    assert cli("pull", f"file://{tmp_path}/r/x", tmp_path / "copy", code=2).err == "error: No space left on device: somewhere\n"
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy.*.partial"))


def test_a_bug_keeps_its_traceback(cli: Any, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speft_hub.describe.describe", lambda folder: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(app, ["inspect", str(adapter_dir)])


def test_ctrl_c_exits_with_130_and_leaves_nothing(hub: LoopbackHub, adapter_dir: Path, tmp_path: Path) -> None:
    from speft_hub import push

    push(adapter_dir, "alice/sst2")
    hub.inject("slow", "adapter_model", seconds=30.0)
    # A test runner in the background ignores SIGINT, and its children with it.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from speft_hub.cli import main; main()"
    command = [sys.executable, "-c", start, "pull", "alice/sst2", str(tmp_path / "copy")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    deadline = time.monotonic() + 120
    while not any("/lfs/get/" in path for _, path, _ in hub.requests):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.strip() == "interrupted"
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy.*.partial"))


def test_help_and_completion(cli: Any) -> None:
    for command in (
        "push",
        "pull",
        "inspect",
        "verify",
        "list",
        "history",
        "card",
        "merge",
        "multihead",
        "export",
        "diff",
        "convert",
    ):
        assert "Usage" in cli(command, "--help").out
    assert "complet" in cli("--help").out
