"""Each package installs and imports alone, declares what it needs, and keeps to the import rules."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from integration.pages import ROOT, tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

PACKAGES = {"speft-core": "speft_core", "speft-train": "speft_train", "speft-hub": "speft_hub"}


def source_of(package: str) -> Path:
    return ROOT / "packages" / package / "src"


def required(distribution: str) -> Iterator[str]:
    """The distributions that one asks for here, extras left out."""
    from packaging.requirements import Requirement

    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def closure(distribution: str) -> set[str]:
    """The distribution's requirements, their requirements, and so on."""
    seen: set[str] = set()
    todo = [distribution]
    while todo:
        for name in required(todo.pop()):
            name = re.sub(r"[-_.]+", "-", name).lower()
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def fresh_environment(package: str, folder: Path) -> dict[str, str]:
    """Environment variables of a Python that sees this package and what it declares, as after `pip install` alone.

    Links to the installed files of each declared distribution stand in for downloading them again.
    """
    site = folder / "site"
    site.mkdir()
    paths = [str(site)]
    for name in sorted(closure(package)):
        if name in PACKAGES:
            paths.append(str(source_of(name)))
            continue
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    paths.append(str(source_of(package)))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


try_wheels = tool("try_wheels")


def alone(package: str, folder: Path, code: str, *words: str) -> str:
    """Run code in that fresh environment: -S keeps every other installed distribution out."""
    command = [sys.executable, "-S", "-c", code, *words]
    run = subprocess.run(command, env=fresh_environment(package, folder), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_with_only_what_is_declared(package: str, tmp_path: Path) -> None:
    count, *loaded = alone(package, tmp_path, try_wheels.IMPORT_ALL, PACKAGES[package]).split()[-2000:]
    assert int(count) >= len(list((source_of(package) / PACKAGES[package]).glob("*.py"))) - 1
    others = {"speft-core": {"speft_train", "speft_hub", "transformers", "deepspeed", "huggingface_hub"},
              "speft-train": {"speft_hub"}, "speft-hub": {"speft_train", "transformers", "deepspeed"}}  # fmt: skip
    assert not others[package] & set(loaded)


def test_the_fresh_environment_hides_the_rest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'transformers'"):
        alone("speft-core", tmp_path, "import transformers")


def test_core_trains_and_saves_with_neither_transformers_nor_deepspeed(tmp_path: Path) -> None:
    alone("speft-core", tmp_path, try_wheels.ATTACH, str(tmp_path / "adapter"))


def test_core_needs_three_distributions() -> None:
    assert set(required("speft-core")) == {"torch", "safetensors", "numpy"}


def project(package: str) -> dict[str, Any]:
    """The `[project]` table of a package."""
    return dict(tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def test_the_three_versions_are_in_step() -> None:
    """One version, and train and hub ask for the core of that minor version."""
    tables = [project(package) for package in PACKAGES]
    (version,) = {table["version"] for table in tables}
    major, minor, _ = version.split(".")
    asked = {line for table in tables for line in table["dependencies"] if line.startswith("speft")}
    assert asked == {f"speft-core>={version},<{major}.{int(minor) + 1}"}
    assert [p for p in PACKAGES if (ROOT / "packages" / p / "LICENSE").read_bytes() != (ROOT / "LICENSE").read_bytes()] == []
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)]", changes, flags=re.M)


# Distributions that are imported under another name.
IMPORTED_AS = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
# Declared though no file imports them: transformers reads GGUF files with the one, and its Trainer runs on the other.
NEEDED_BY_OTHERS = {"gguf", "accelerate"}
# Imported though not declared: both only where they are there (Triton comes with torch, httpx* with huggingface_hub).
COME_ALONG = {"triton", "httpx", "httpx2"}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_declared_is_imported_and_the_reverse(package: str) -> None:
    table = project(package)
    extras = [line for lines in table.get("optional-dependencies", {}).values() for line in lines]
    names = {re.split(r"[ ;<>=!\[]", line)[0].lower() for line in [*table["dependencies"], *extras]}
    declared = {IMPORTED_AS.get(name, name).replace("-", "_") for name in names}
    imported = {
        name.split(".")[0]
        for path in source_of(package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported_names(node)
    }
    others = imported - set(sys.stdlib_module_names) - {PACKAGES[package]} - COME_ALONG
    assert others == declared - NEEDED_BY_OTHERS


def imported_names(node: ast.AST) -> list[str]:
    """The absolute names of modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_source_file(package: str, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(ROOT / "packages" / package, copy, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(copy)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        texts = {name.rpartition("/")[2]: archive.read(name).decode() for name in packed if ".dist-info/" in name}
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in texts["METADATA"] and "Requires-Python: >=3.10" in texts["METADATA"]
    assert ("entry_points.txt" in texts) == (package != "speft-core")
    module = PACKAGES[package]
    wanted = {str(path.relative_to(copy / "src")) for path in (copy / "src" / module).rglob("*") if path.is_file()}
    assert {f"{module}/__init__.py", f"{module}/py.typed"} <= wanted <= packed
    assert {name.split("/")[0] for name in packed} == {module, next(n.split("/")[0] for n in packed if ".dist-info" in n)}


@pytest.mark.parametrize(("command", "package"), [("speft-train", "speft-train"), ("speft-hub", "speft-hub")])
def test_the_command_is_installed_and_explains_itself(command: str, package: str) -> None:
    program = Path(sys.executable).parent / command
    run = subprocess.run([str(program), "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert command in run.stdout


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the root pyproject.toml against the packages in a folder of copies."""
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    for package, module in PACKAGES.items():
        shutil.copytree(source_of(package) / module, tmp_path / module, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_import_rules_hold(copies: Path) -> None:
    run = lint_imports(copies)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"4 kept, 0 broken", run.stdout)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("speft_core/errors.py", "import transformers"),
        ("speft_core/errors.py", "import speft_hub"),
        ("speft_train/config.py", "import speft_hub"),
        ("speft_hub/names.py", "import speft_train"),
        ("speft_train/config.py", "import deepspeed"),
        ("speft_hub/names.py", "import transformers"),
    ],
)
def test_a_forbidden_import_is_noticed(file: str, line: str, copies: Path) -> None:
    with (copies / file).open("a") as out:
        out.write(f"\n\ndef _late() -> None:\n    {line}\n")
    run = lint_imports(copies)
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(r"[1-9] broken", run.stdout)


def files_that_import(name: str, folder: Path) -> list[str]:
    """The Python files that import a top-level package anywhere, also inside functions."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if any(module.split(".")[0] == name for module in imported_names(node)):
                found.append(str(path.relative_to(folder)))
                break
    return found


def test_one_file_imports_deepspeed() -> None:
    assert files_that_import("deepspeed", ROOT / "packages") == ["speft-train/src/speft_train/engine.py"]


def test_one_file_of_speft_hub_imports_huggingface_hub() -> None:
    assert len(files_that_import("huggingface_hub", source_of("speft-hub"))) == 1


def test_every_pin_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert set().union(*(closure(package) for package in PACKAGES)) - set(PACKAGES) <= pinned
