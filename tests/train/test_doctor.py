"""`speft-train doctor`: every check says something; what would stop a run ends in one line and exit code 2."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from speft_train import cli, doctor


def test_every_check_speaks_and_advises() -> None:
    for name, check in doctor.CHECKS.items():
        state, found, advice = check()
        assert state in (doctor.OK, doctor.NOTE, doctor.BAD), name
        assert found and (state == doctor.OK or advice or "CPU" in found), name


def test_the_command_shows_the_table() -> None:
    found = CliRunner().invoke(cli.app, ["doctor"])
    assert found.exit_code == 0, found.output
    assert all(name.split()[0] in found.output for name in doctor.CHECKS)


def test_what_would_stop_a_run_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e9)
    from rich.console import Console

    assert cli.guarded(lambda: doctor.show(Console())) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: not ready for a run: disk; the last column of the table says what to do"]
