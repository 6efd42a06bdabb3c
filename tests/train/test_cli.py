"""The command line: every expected failure is one line on stderr and exit code 2; --dry-run needs no weights and no network."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pico_run import make_config, make_model
from speft_core import UserError
from speft_train import cli
from speft_train.signals import Stopped

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def attempt(config: Path, *overrides: str, dry_run: bool = False) -> int:
    return cli.guarded(lambda: cli.execute(config, list(overrides), dry_run))


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


MISTAKES: list[tuple[list[str], str]] = [
    (["train.learning_rat=1"], "learning_rate"),
    (["adapter.targets=[q_prj]"], "q_proj"),
    (["adapter.budget.density=1.5"], "density"),
    (["adapter.budget.k=99999999"], "the budget must fit the targets"),
    (["model.name=/nowhere/at/all"], "does not exist"),
    (["data.train=/nowhere.jsonl"], "/nowhere.jsonl"),
    (["data.columns={question: q}"], "column"),
    (["train.save_only_model=true"], "no run can resume"),
    (["train.optim=adam_w"], "adam"),
    (["train.global_batch_size=64"], "must fill one global batch of 64; got 40 examples"),
    (["train.eval_strategy=steps"], "validation"),
    (["adapter.mask=/nowhere.safetensors"], "/nowhere.safetensors does not exist"),
    (["adapter.method=lora", "adapter.budget.k=3"], "LoRA of rank 1"),
    (["nonsense"], "section.key=value"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES)
def test_mistakes_are_one_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    assert attempt(config, "evaluate.enabled=false", *overrides) == 2
    assert words in one_error_line(capsys)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_missing_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path / "no.yaml") == 2
    assert "does not exist" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("too\nlong"), 2, "error: too long"),
        (OSError(28, "No space left on device", "/runs/x"), 2, "error: No space left on device (/runs/x)"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 2, "error: the disk is full or"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGINT, "stopped after step 3"), 130, "stopped after step 3"),
        (Stopped(signal.SIGTERM, "stopped after step 3"), 143, "stopped after step 3"),
    ],
)
def test_exit_codes(error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert cli.guarded(work) == code
    assert capsys.readouterr().err.startswith(words)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 / 0)


def test_dry_run_writes_nothing(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    assert attempt(config, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "effective batch: 8 = 8 a device x 1 accumulation steps x 1 process; 6 steps" in shown
    assert not (tmp_path / "run").exists()


def test_dry_run_of_qwen2_7b_needs_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """k is that of LoRA of rank 64 on q, k, v, o of the published shapes."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert attempt(CONFIGS / "qwen2_7b_alpaca.yaml", f"output_dir={tmp_path / 'run'}", dry_run=True) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Qwen/Qwen2-7B, 7,615,616,512 parameters in bfloat16" in shown
    assert "k = 40,370,176" in shown and "0.53% of all parameters" in shown
    assert "effective batch: 16 = 2 a device x 1 accumulation steps x 8 processes" in shown
    assert not list(tmp_path.iterdir())


def test_the_launcher_s_local_rank_may_stand_first(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("LOCAL_RANK", "0")  # and is put back after the test
    config = make_config(tmp_path / "c.yaml", model, tmp_path / "run")
    found = CliRunner().invoke(cli.app, ["run", "--local_rank=0", str(config), "train.max_steps=3", "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "3 steps" in found.output


def test_another_rank_waits_for_the_launcher_before_it_tells_of_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 has mostly found the same, and left; then the launcher ends this rank. If it does not, this rank alone knows."""
    waits: list[float] = []

    def wrong() -> None:
        raise UserError("no such key")

    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waits.append(seconds))
    assert cli.guarded(wrong) == 2 and capsys.readouterr().err == "error: no such key\n" and not waits
    monkeypatch.setenv("RANK", "1")
    assert cli.guarded(wrong) == 2 and capsys.readouterr().err == "rank 1: error: no such key\n" and waits == [cli.PATIENCE]
    monkeypatch.setattr(cli, "_have_joined", lambda: True)  # ranks that talk hear of each other's end
    assert cli.guarded(wrong) == 2 and capsys.readouterr().err == "rank 1: error: no such key\n" and len(waits) == 1
    monkeypatch.setattr(cli, "_have_joined", lambda: False)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    assert cli.guarded(wrong) == 2 and capsys.readouterr().err == ""
