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

import pytest

ROOT = Path(__file__).parents[2]
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


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if name.endswith(".__main__"):
        continue  # importing it would run the command
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (name, error.name) != ("speft_core.ops.triton_kernel", "triton"):  # comes with torch where there is a GPU
            raise
loaded = {name.partition(".")[0] for name in sys.modules}
print(len(names), *sorted(loaded))
"""

ATTACH = """
import sys, torch, speft_core as sc
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
x, y = torch.randn(8, 6), torch.randn(8, 2)
mask = sc.find_mask(model, [], metric="random", budget=sc.Budget(k=7), targets="all-linear", seed=0)
tuner = sc.attach(model, mask)
torch.nn.functional.mse_loss(model(x), y).backward()
torch.optim.SGD(tuner.parameters(), lr=0.1).step()
tuner.adapter().save(sys.argv[1])
tuner.detach()
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
assert sc.SparseAdapter.load(sys.argv[1]).nnz == 7
"""


def alone(package: str, folder: Path, code: str, *words: str) -> str:
    """Run code in that fresh environment: -S keeps every other installed distribution out."""
    command = [sys.executable, "-S", "-c", code, *words]
    run = subprocess.run(command, env=fresh_environment(package, folder), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_with_only_what_is_declared(package: str, tmp_path: Path) -> None:
    count, *loaded = alone(package, tmp_path, IMPORT_ALL, PACKAGES[package]).split()[-2000:]
    assert int(count) >= len(list((source_of(package) / PACKAGES[package]).glob("*.py"))) - 1
    others = {"speft-core": {"speft_train", "speft_hub", "transformers", "deepspeed", "huggingface_hub"},
              "speft-train": {"speft_hub"}, "speft-hub": {"speft_train", "transformers", "deepspeed"}}  # fmt: skip
    assert not others[package] & set(loaded)


def test_the_fresh_environment_hides_the_rest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'transformers'"):
        alone("speft-core", tmp_path, "import transformers")


def test_core_trains_and_saves_with_neither_transformers_nor_deepspeed(tmp_path: Path) -> None:
    alone("speft-core", tmp_path, ATTACH, str(tmp_path / "adapter"))


def test_core_needs_three_distributions() -> None:
    assert set(required("speft-core")) == {"torch", "safetensors", "numpy"}


def test_the_three_versions_are_in_step() -> None:
    assert len({metadata.version(package) for package in PACKAGES}) == 1


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
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            if any(module.split(".")[0] == name for module in modules):
                found.append(str(path.relative_to(folder)))
                break
    return found


def test_one_file_imports_deepspeed() -> None:
    assert files_that_import("deepspeed", ROOT / "packages") == ["speft-train/src/speft_train/engine.py"]


def test_one_file_of_speft_hub_imports_huggingface_hub() -> None:
    assert len(files_that_import("huggingface_hub", source_of("speft-hub"))) == 1


def test_no_file_is_too_long() -> None:
    """Above 350 lines a file wants splitting by subject."""
    files = [path for folder in ("packages", "tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    assert [str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 350] == []


def test_every_pin_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert set().union(*(closure(package) for package in PACKAGES)) - set(PACKAGES) <= pinned
