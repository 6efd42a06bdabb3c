"""Signals: at once outside training, noted within it."""

from __future__ import annotations

import os
import signal

import pytest

from speft_train import signals


def send(*signums: int) -> None:
    for signum in signums:
        os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_training_a_signal_ends_the_run_at_once(signum: int, code: int) -> None:
    former = signal.getsignal(signum)
    with pytest.raises(signals.Stopped) as stopped, signals.handled():
        send(signum)
        pytest.fail("the signal was not raised")
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is former


def test_the_first_signal_counts_and_a_launcher_s_echo_changes_nothing() -> None:
    with signals.handled() as request:
        with request.deferring():
            send(signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
            assert request.signum == signal.SIGINT
        send(signal.SIGTERM)  # after the loop, while the run ends
        with signals.handled() as inner:
            assert inner is request
        send(signal.SIGTERM)  # while the command tells the user
    with signals.handled() as again:
        assert again.signum is None


def test_what_another_rank_noted_counts_here() -> None:
    with signals.handled() as request:
        request.note(signal.SIGTERM)
        request.note(signal.SIGINT)
        send(signal.SIGTERM)
        assert request.signum == signal.SIGTERM


def test_no_library_goes_on_after_a_signal() -> None:
    with pytest.raises(signals.Stopped), signals.handled():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")


def test_a_second_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.handled() as request, request.deferring():
        send(signal.SIGINT)
        now[0] += 5
        send(signal.SIGTERM)
        with pytest.raises(signals.Stopped, match="a second time") as stopped:
            send(signal.SIGINT)
    assert stopped.value.exit_code == 130
