"""Files that hold something else under the same name: measured again, made anew, or refused where the run has trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import speft_core as sc
from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import callbacks, checkpoints, cli, contents, results, stages, sweep
from speft_train.data import sources
from speft_train.folder import RunFolder
from speft_train.signals import Stopped
from speft_train.sweep_config import load_sweep

Execute = Callable[..., dict[str, Any]]
ROWS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}"} for n in range(24)]
WRONG = [*ROWS[:-1], {**ROWS[-1], "answer": "It is 99"}]


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """A config of a run in tmp_path/run on train.jsonl, valid.jsonl and test.jsonl there, of four steps."""
    for name in ("train", "valid", "test"):
        write(tmp_path / f"{name}.jsonl", ROWS)

    def made(**sections: Any) -> Path:
        data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"), **sections.pop("data", {})}
        train = {"max_steps": 4, **sections.pop("train", {})}
        quick = {"generation": False, **sections.pop("evaluate", {})}
        return make_config(tmp_path / "run.yaml", model, tmp_path / "run", data=data, train=train, evaluate=quick, **sections)

    return made


@pytest.fixture
def execute(tmp_path: Path, config: Callable[..., Path]) -> Execute:
    """Run it and give its results."""

    def run(*overrides: str, **sections: Any) -> dict[str, Any]:
        cli.execute(config(**sections), list(overrides), dry_run=False)
        return results.read(RunFolder(tmp_path / "run"))

    return run


def stopped(execute: Execute, **sections: Any) -> None:
    """A SIGTERM in step 2."""
    on_step_end = callbacks.StopOnSignal.on_step_end

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.request(15, None)
        on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="checkpoint-2 is saved"):
        patch.setattr(callbacks.StopOnSignal, "on_step_end", signalled)
        execute(**sections)


def refused(execute: Execute, what: str, **sections: Any) -> None:
    """In one line that names the file, with everything on the disk as it was."""
    folder = Path(sections.pop("folder"))
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(UserError) as error:
        execute("evaluate.limit=3", **sections)
    assert f"holds a run that was trained before {what} changed; " in str(error.value) and "\n" not in str(error.value)
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_changed_test_data_are_measured_again_and_nothing_is_trained(
    tmp_path: Path, execute: Execute, worked: list[str]
) -> None:
    found = execute()
    worked.clear()
    write(tmp_path / "test.jsonl", WRONG[::-1])
    again = execute()
    assert worked == ["load", "base", "evaluate", "report"]
    assert again["digest"] == found["digest"]
    assert all(again[key]["loss"] != found[key]["loss"] for key in ("base", "adapted"))
    worked.clear()
    assert execute() == again and worked == []


def test_changed_training_data_of_a_finished_run_are_refused(tmp_path: Path, execute: Execute, worked: list[str]) -> None:
    """Written anew with the same content they have not changed; once they are gone there is nothing to compare."""
    found, file = execute(), tmp_path / "train.jsonl"
    worked.clear()
    write(file, WRONG)
    refused(execute, f"data.train ({file})", folder=tmp_path / "run")
    write(file, ROWS)
    assert execute() == found
    file.unlink()
    (tmp_path / "test.jsonl").unlink()
    assert execute() == found and worked == []


def test_a_checkpoint_is_not_continued_on_changed_data(tmp_path: Path, execute: Execute) -> None:
    """It knows itself what it was trained on: the records may be removed."""
    held = {"data": {"validation_from_train": 8}}
    stopped(execute, **held)
    file, marker = tmp_path / "train.jsonl", tmp_path / "run/checkpoint-2/COMPLETE"
    assert checkpoints.contents(marker.parent) == {"data.train": sources.fingerprint(file)}
    assert checkpoints.made_by(marker.parent) == {"engine": "torch"}
    (tmp_path / "run/stages.json").unlink()
    write(file, WRONG)
    refused(execute, f"data.train ({file})", folder=tmp_path / "run", **held)
    write(file, ROWS)
    assert execute(**held)["steps"] == 4
    assert "resumed from checkpoint-2" in (tmp_path / "run/report.md").read_text()


def test_before_anything_is_trained_changed_data_run_anew(
    tmp_path: Path, execute: Execute, worked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(run: Any) -> Any:
        raise Stopped(9, "killed")

    rows = tuple(stages.Stage(**{**vars(s), "work": dies if s.name == "train" else s.work}) for s in stages.STAGES)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="killed"):
        patch.setattr(stages, "STAGES", rows)
        execute()
    mask = (tmp_path / "run/mask.safetensors").read_bytes()
    write(tmp_path / "train.jsonl", [{"question": "zq" * 9, "answer": "#" * n} for n in range(1, 25)])
    worked.clear()
    execute()
    assert worked == ["load", "base", "mask", "attach", "train", "save", "evaluate", "report"]
    assert (tmp_path / "run/mask.safetensors").read_bytes() != mask


def test_a_changed_mask_file_is_refused(tmp_path: Path, config: Callable[..., Path], execute: Execute) -> None:
    cli.execute(config(), ["adapter.metric=magnitude", f"output_dir={tmp_path}/first", "evaluate.enabled=false"], dry_run=False)
    ready = tmp_path / "ready.safetensors"
    ready.write_bytes((tmp_path / "first/mask.safetensors").read_bytes())
    sections = {"adapter": {"mask": str(ready)}, "evaluate": {"enabled": False}}
    execute(**sections)
    mask = sc.SparsityMask.load(ready)
    sc.SparsityMask({name: indices[:-1] for name, indices in mask.indices.items()}, mask.shapes).save(ready)
    refused(execute, f"adapter.mask ({ready})", folder=tmp_path / "run", **sections)


def test_changed_validation_data_are_measured_again_unless_training_looked_at_them(
    tmp_path: Path, execute: Execute, worked: list[str]
) -> None:
    file = tmp_path / "valid.jsonl"
    sections: dict[str, Any] = {"data": {"test": None, "validation": str(file)}}
    found = execute(**sections)
    worked.clear()
    write(file, WRONG[::-1])
    again = execute(**sections)
    assert worked == ["load", "base", "evaluate", "report"] and again["adapted"]["loss"] != found["adapted"]["loss"]
    looked = {"eval_strategy": "steps", "eval_steps": 2}
    sections |= {"train": looked, "output_dir": str(tmp_path / "looked")}
    execute(**sections)
    write(file, ROWS)
    worked.clear()
    sections["train"] = {**looked, "save_steps": 3, "per_device_eval_batch_size": 1}
    execute(**sections)
    assert worked == ["load", "base", "evaluate", "report"]
    sections |= {"train": {**looked, "lr_scheduler_type": "reduce_lr_on_plateau"}, "output_dir": str(tmp_path / "steered")}
    execute(**sections)
    write(file, WRONG)
    refused(execute, f"data.validation ({file})", folder=tmp_path / "steered", **sections)


def test_records_of_older_versions_are_accepted(tmp_path: Path, execute: Execute, worked: list[str]) -> None:
    found = execute()
    worked.clear()
    record, marker = tmp_path / "run/stages.json", tmp_path / "run/checkpoint-4/COMPLETE"
    for file in (record, marker):
        tree = json.loads(file.read_text())
        tree.pop("files", None)
        if file == record:
            assert all(stage.pop("files") for stage in tree.values())
        file.write_text(json.dumps(tree))
    write(tmp_path / "train.jsonl", WRONG)
    write(tmp_path / "test.jsonl", WRONG)
    assert execute() == found and worked == []


def test_files_are_read_once_a_start_and_not_at_all_by_a_dry_run(
    tmp_path: Path, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(sources, "fingerprint", lambda path: read.append(path.name) or path.name)
    file = config()
    cli.execute(file, [], dry_run=False)
    assert read == ["train.jsonl", "test.jsonl"]
    cli.execute(file, [], dry_run=True)
    assert len(read) == 2


def test_a_file_that_two_keys_name_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    before = sources.fingerprint(file)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
        assert sources.fingerprint(file) == before
    write(file, WRONG)
    assert sources.fingerprint(file) != before


def test_a_sweep_does_not_take_old_figures_for_those_of_changed_data(
    tmp_path: Path, config: Callable[..., Path], worked: list[str]
) -> None:
    file = config(sweep={"rows": {"sparse": {}}, "columns": {"A": {"score": "loss"}}})
    cell = load_sweep(file).cell("sparse", "A", 0, ())
    sweep.run_cells([cell], sweep.Console(quiet=True), sweep.Settings())
    assert sweep.is_done(cell)
    write(tmp_path / "test.jsonl", WRONG)
    assert not sweep.is_done(cell) and sweep.is_done(cell, read=False)
    worked.clear()
    sweep.run_cells([cell], sweep.Console(quiet=True), sweep.Settings())
    assert worked == ["load", "base", "evaluate", "report"] and sweep.is_done(cell)
    write(tmp_path / "train.jsonl", WRONG)
    settings = sweep.Settings()
    sweep.run_cells([cell], sweep.Console(quiet=True), settings)
    assert "trained before data.train" in settings.failed[cell.name] and sweep.figures(cell) is None


def test_more_test_sets_are_files_too(tmp_path: Path) -> None:
    from speft_train.config import from_mapping

    file = write(tmp_path / "more.jsonl", ROWS)
    data = {"train": "org/set", "more_tests": {"here": str(file), "there": "a_split", "gone": str(tmp_path / "gone.csv")}}
    cfg = from_mapping({"output_dir": "out", "model": {"name": "m"}, "data": data, "adapter": {"budget": {"k": 1}}})
    assert contents.of(cfg) == {"data.more_tests.here": sources.fingerprint(file)}
