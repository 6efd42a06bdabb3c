"""docs/errors.md, word for word: what a person does wrong, what the commands answer, and that nothing was changed by it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hub.helpers import Pico, pico_adapter

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/errors.md"


def rows() -> list[tuple[str, str, int]]:
    """(command, answer, exit code) of each row whose first cell is a command."""
    found = re.findall(r"^\| `(speft-[^`]+)` \| (.+?) \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return [(command.replace("\\|", "|"), answer.replace("\\|", "|"), int(code)) for command, answer, code in found]


def prepare(folder: Path) -> None:
    """What the page says lies in the folder."""
    pico_adapter().save(folder / "adapter")
    pico_adapter(seed=1).save(folder / "second")
    other = pico_adapter(model=Pico(seed=9))
    other.save(folder / "foreign")
    for name in ("damaged", "future", "nan", "extra"):
        shutil.copytree(folder / "adapter", folder / name)
    weights = folder / "damaged/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    record = json.loads((folder / "future/adapter_config.json").read_text())
    (folder / "future/adapter_config.json").write_text(json.dumps(record | {"format_version": 99}))
    (folder / "peft").mkdir()
    (folder / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "peft/adapter_model.safetensors").write_bytes(b"")
    (folder / "extra/.env").write_text("X=1\n")
    (folder / "extra/training_config.yaml").write_text("hub_token: hf_" + "a" * 34 + "\n")
    (folder / "photos").mkdir()
    (folder / "photos/cat.jpg").write_bytes(b"x")
    (folder / "notes.txt").write_text("hello\n")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "run.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\noutput_dir: runs/mine\n")
    (folder / "broken.yaml").write_text("model: {name: x\n")
    done = folder / "runs/done"
    done.mkdir(parents=True)


def answer(command: str, folder: Path) -> tuple[str, int]:
    """The last line that the command writes to stderr, without the frame that Typer draws, and its exit code."""
    program, *words = shlex.split(command)
    err, out = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = _call(program, words)
    finally:
        os.chdir(before)
    lines = [line.strip(" │") for line in err.getvalue().splitlines() if re.search(r"[A-Za-z]", line)]
    said = [line for line in lines if not line.startswith(("Usage:", "Try ", "╭"))]
    return " ".join(said).strip(), code


def _call(program: str, words: list[str]) -> int:
    if program == "speft-hub":
        from speft_hub.cli import app as hub
        from speft_hub.console import run

        return run(hub, words)
    from speft_train.cli import app as train

    try:
        train(args=words, prog_name="speft-train")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrong")
    prepare(place)
    assert answer("speft-hub push adapter file://$PWD/registry/me/a".replace("$PWD", str(place)), place)[1] == 0
    return place


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_the_page_has_twenty_wrong_things() -> None:
    assert len(rows()) >= 20


@pytest.mark.parametrize("number", range(len(rows()) if PAGE.is_file() else 0))
def test_the_answer_is_the_one_in_the_page(number: int, folder: Path) -> None:
    command, expected, code = rows()[number]
    before = state(folder)
    found, exit_code = answer(command.replace("$PWD", str(folder)), folder)
    assert found.replace(str(folder), "$PWD") == expected
    assert exit_code == code
    assert state(folder) == before
