"""Build the three packages and try their wheels in fresh environments, each alone and all together.

    python tools/try_wheels.py                              with this Python; wheels and sources stay in dist/
    python tools/try_wheels.py --python python3.12          with another
    python tools/try_wheels.py --python python3.13 --no-deps    where PyTorch has no wheel: install, compile, read the metadata

It needs the network, `pip install build` and some minutes: a step of a release (CONTRIBUTING.md), not of the tests.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {"speft-core": "speft_core", "speft-hub": "speft_hub", "speft-train": "speft_train"}
COMMANDS = {"speft-hub": "speft-hub", "speft-train": "speft-train"}
CASES = [["speft-core"], ["speft-hub"], ["speft-train"], list(MODULES)]

# Imports every module of a package (argument 1) and prints how many there are, then the top-level packages that came along.
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

# Trains an adapter of 7 scalars into a folder (argument 1), takes it off and reads it back.
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

# What an installed distribution (argument 1, its module argument 2) says of itself; prints its version.
METADATA = """
import importlib.metadata as m, pathlib, sys
found = m.distribution(sys.argv[1])
files = {str(f) for f in found.files}
assert sys.argv[2] + "/py.typed" in files, "py.typed"
assert any(f.endswith("licenses/LICENSE") for f in files), "LICENSE"
assert found.metadata["License-Expression"] == "Apache-2.0" and found.metadata["Requires-Python"] == ">=3.10"
print(found.version)
"""


def say(*words: object) -> None:
    """One line at once, also into a pipe."""
    print(*words, flush=True)


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; SystemExit with its last lines when it fails."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def build(folder: Path) -> None:
    """Source distribution and wheel of each package, the wheel from the source distribution."""
    for package in MODULES:
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT / "packages" / package)
        say("built", package)


def wheel_of(package: str, dist: Path) -> Path:
    """The one wheel of a package there."""
    (wheel,) = dist.glob(f"{MODULES[package]}-*.whl")
    return wheel


def attempt(packages: list[str], dist: Path, python: str, deps: bool, folder: Path) -> None:
    """A fresh environment with these packages: what it says of itself, that every module imports, that commands answer."""
    run(python, "-m", "venv", folder / "venv")
    bin_ = folder / "venv" / "bin"
    pip = [bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--find-links", dist]
    pip += ["--constraint", ROOT / "constraints.txt"] if deps else ["--no-deps"]
    run(*pip, *(wheel_of(package, dist) for package in packages))
    versions = {run(bin_ / "python", "-c", METADATA, package, MODULES[package], cwd=folder).strip() for package in packages}
    if not deps:
        (library,) = (folder / "venv/lib").glob("python3*/site-packages")
        run(bin_ / "python", "-W", "error", "-m", "compileall", "-q", *(library / MODULES[package] for package in packages))
        say(f"{' + '.join(packages)} {', '.join(versions)}: installed without dependencies, compiled")
        return
    run(bin_ / "python", "-m", "pip", "check")
    for package in packages:
        run(bin_ / "python", "-c", IMPORT_ALL, MODULES[package], cwd=folder)
        if package in COMMANDS:
            run(bin_ / COMMANDS[package], "--help", cwd=folder)
    run(bin_ / "python", "-c", ATTACH, folder / "adapter", cwd=folder)
    if "speft-hub" in packages:
        run(bin_ / "speft-hub", "push", folder / "adapter", f"file://{folder}/registry/me/a", cwd=folder)
        run(bin_ / "speft-hub", "pull", f"file://{folder}/registry/me/a", folder / "copy", cwd=folder)
    say(f"{' + '.join(packages)} {', '.join(versions)}: imports, answers, trains an adapter")


def main(words: list[str] | None = None) -> None:
    """Build once, try every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the fresh environments")
    parser.add_argument("--no-deps", action="store_true", help="leave dependencies out: no import, no command")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the built files go")
    asked = parser.parse_args(words)
    asked.dist.mkdir(parents=True, exist_ok=True)
    for old in [*asked.dist.glob("speft_*.whl"), *asked.dist.glob("speft_*.tar.gz")]:
        old.unlink()
    build(asked.dist)
    say("Python", run(asked.python, "-c", "import platform; print(platform.python_version())").strip())
    for packages in CASES:
        with tempfile.TemporaryDirectory(prefix="speft-wheels-") as folder:
            attempt(packages, asked.dist.resolve(), asked.python, not asked.no_deps, Path(folder))


if __name__ == "__main__":
    main()
