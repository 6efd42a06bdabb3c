"""What docs/security.md promises of the sources and the commands."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "packages").rglob("*.py") if "build" not in p.parts)
SECRET = "hf_" + "Secret0123456789abcdefghijklmnopqr"


def nodes() -> Iterator[tuple[str, ast.AST]]:
    assert len(SOURCES) > 100
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.name, node


def called(node: ast.AST) -> str:
    """The dotted name of what a call calls."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_remote_code_is_off_wherever_it_is_mentioned() -> None:
    said = [(file, node.value) for file, node in nodes() if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"]
    assert said
    assert [file for file, value in said if not (isinstance(value, ast.Constant) and value.value is False)] == []
    for file, node in nodes():  # as a key of a mapping that becomes keywords
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "trust_remote_code"]
            assert all(isinstance(v, ast.Constant) and v.value is False for v in values), file


def test_no_file_turns_remote_code_on() -> None:
    asking = [str(p) for p in (ROOT / "configs").rglob("*.yaml") if "trust_remote_code" in p.read_text(encoding="utf-8")]
    assert asking == []


@pytest.mark.parametrize("key", ["model.trust_remote_code=true", "data.trust_remote_code=true", "train.trust_remote_code=true"])
def test_no_key_turns_remote_code_on(key: str) -> None:
    from speft_core import UserError
    from speft_train.config import load_config

    with pytest.raises(UserError, match="trust_remote_code"):
        load_config(ROOT / "configs/quickstart.yaml", [key])


def test_no_pickle() -> None:
    forbidden = {"pickle", "cPickle", "marshal", "dill", "joblib", "cloudpickle", "shelve"}
    for file, node in nodes():
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not forbidden & {name.split(".")[0] for name in names}, file
    loads = [(file, node) for file, node in nodes() if called(node) == "torch.load"]
    assert {"unpickle.py"} <= {file for file, _ in loads}
    assert [file for file, node in loads if "weights_only=True" not in ast.unparse(node)] == []
    assert not any(isinstance(node, ast.keyword) and node.arg == "allow_pickle" for _, node in nodes())


def test_no_shell_and_no_unsafe_yaml() -> None:
    for file, node in nodes():
        assert not (isinstance(node, ast.keyword) and node.arg == "shell"), file
        assert called(node) not in ("os.system", "os.popen", "eval", "exec", "yaml.unsafe_load", "yaml.full_load"), file
        if called(node) == "yaml.load":
            assert "Loader=" in ast.unparse(node), file


def test_a_configuration_is_plain_values(tmp_path: Path) -> None:
    from speft_core import UserError
    from speft_train.config import load_config

    for text in ("model: !!python/object/apply:os.getcwd []\n", "output_dir: ${oc.env:HOME}\n"):
        (tmp_path / "x.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\n{text}")
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / "x.yaml")
        assert os.environ["HOME"] not in str(caught.value)


@pytest.mark.parametrize("key", ["train.hub_token", "model.token", "data.token", "hub_token"])
def test_a_token_in_a_configuration_is_refused_and_not_repeated(key: str) -> None:
    from speft_core import UserError
    from speft_train.config import load_config

    with pytest.raises(UserError, match="token") as caught:
        load_config(ROOT / "configs/quickstart.yaml", [f"{key}={SECRET}"])
    assert SECRET not in str(caught.value)


def test_a_token_in_the_environment_is_in_no_message(tmp_path: Path) -> None:
    """Refusals of every kind, with a token set: it is on neither stream and in no file."""
    folder = Path(sys.executable).parent
    home = {"HF_TOKEN": SECRET, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://hub.example"}
    for words in (
        ["speft-hub", "pull", "alice/sst2", str(tmp_path / "a")],
        ["speft-hub", "push", str(tmp_path), "alice/sst2"],
        ["speft-train", "run", str(ROOT / "configs/quickstart.yaml"), "model.nmae=x"],
    ):
        run = subprocess.run([str(folder / words[0]), *words[1:]], env=os.environ | home, capture_output=True, text=True)
        assert run.returncode == 2, run.stderr
        assert run.stderr.count("\n") == 1 and SECRET not in run.stderr + run.stdout
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
