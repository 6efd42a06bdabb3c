"""Commands that write a folder for a while: what came there meanwhile stays, and what ends them leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pico
from hub.helpers import pico_adapter
from speft_core import AdapterConfig, SparseAdapter, SparseDelta, files
from speft_core.fingerprint import fingerprint
from speft_hub.cli import app
from speft_hub.console import run

COMMANDS = {
    "merge": "merge {t}/a {t}/b --out {t}/out",
    "multihead": "multihead {t}/a {t}/b --out {t}/out",
    "convert": "convert {t}/tuned {t}/out --against {t}/base",
    "to shira": "convert {t}/matrix {t}/out --to shira",
    "export": "export {t}/matrix {t}/out --base {t}/base",
    "pull": "pull file://{t}/registry/me/a {t}/out",
}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Sources for every command."""
    pico_adapter().save(tmp_path / "a")
    pico_adapter(seed=1).save(tmp_path / "b")
    for folder, seed in (("base", 0), ("tuned", 1)):
        pico.llama(seed=seed).save_pretrained(tmp_path / folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(pico.llama().named_parameters())[name]
    indices = torch.arange(32, dtype=torch.int32)
    delta = SparseDelta(indices, torch.ones(32), tuple(weight.shape))
    config = AdapterConfig(base_model_name_or_path=str(tmp_path / "base"))
    SparseAdapter({name: delta}, {}, config, {name: fingerprint(weight, indices)}).save(tmp_path / "matrix")
    assert run(app, ["push", str(tmp_path / "a"), f"file://{tmp_path}/registry/me/a"]) == 0
    return tmp_path


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_of_two_writers_refuses(
    room: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there before the new folder takes its name is as good as what was there at the start."""
    words, flush = COMMANDS[command].format(t=room).split(), files._flush
    first = room / ("base" if command == "export" else "b")

    def meanwhile(path: Path) -> None:
        if not (room / "out").exists():
            shutil.copytree(first, room / "out")
        flush(path)

    monkeypatch.setattr(files, "_flush", meanwhile)
    capsys.readouterr()
    assert run(app, words) == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    assert contents(room / "out") == contents(first)
    assert hidden(room) == []
    shutil.rmtree(room / "out")
    assert run(app, [*words, "--force"]) == 0  # for whoever asks to replace what is there
    assert contents(room / "out") != contents(first) and hidden(room) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_what_killed_ones_left_is_swept(room: Path, command: str) -> None:
    dead = room / ".out.abc12_yz.partial"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"a copy of a whole base")
    assert run(app, COMMANDS[command].format(t=room).split()) == 0
    assert hidden(room) == [] and (room / "out").is_dir()


# A child in which writing takes for ever, once it says so. SIGINT, which a test runner in the background ignores, is as for others.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from speft_core import files
def slowly(path):
    print("writing", flush=True)
    time.sleep(100)
files._flush = slowly
from speft_hub.cli import main
main()
"""


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_one_line_and_leaves_nothing(room: Path, command: str, number: int, code: int) -> None:
    words = [sys.executable, "-c", SLOW, *COMMANDS[command].format(t=room).split()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
        assert len(hidden(room)) == 1
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (code, "interrupted\n")
    assert hidden(room) == [] and not (room / "out").exists()


def test_sigterm_is_given_back(room: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(app, ["verify", str(room / "a")]) == 0
    assert signal.getsignal(signal.SIGTERM) == before


def started(words: list[str], path: Path) -> subprocess.Popen[str]:
    """A child with SIGINT as a shell gives it, whose PyTorch takes for ever to import; it says so when it begins."""
    (path / "torch").mkdir(exist_ok=True)
    (path / "torch/__init__.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(100)\n")
    reset = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", reset, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=path)


@pytest.mark.parametrize("words", [["-m", "speft_hub", "list"], ["-c", "from speft_hub.cli import main; main()", "list"]])
def test_ctrl_c_while_modules_are_loaded_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with started(words, tmp_path) as child:
        assert child.stdout is not None and child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "interrupted\n")


def test_the_package_is_imported_in_a_moment() -> None:
    look = (
        "import sys, speft_hub.cli; assert not {'torch', 'huggingface_hub', 'typer'} & sys.modules.keys();"
        "from speft_hub import push, Pulled; assert 'torch' in sys.modules;"
        "assert all(getattr(speft_hub, name).__name__ == name for name in speft_hub.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import speft_hub
    import speft_hub.cli

    for module in (speft_hub, speft_hub.cli):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018
