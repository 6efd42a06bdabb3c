"""Files that cannot be written whole, at every stage of a run: one line that says so, no half file, and the same command goes on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pico_run import make_config, make_model
from speft_train import cli

# The files of a run that are the first to be too large, in the order in which a run writes them.
WATCHED = ("mask.safetensors", "trainable.safetensors", "optimizer.pt", "adapter_model.safetensors", "loss.png", "results.json")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writes beyond `size` bytes of a file fail; Python ignores the signal, so they are errors."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def config_of(tmp_path: Path, model: Path, name: str) -> Path:
    """A run of two steps into the folder `name`."""
    sections = {"train": {"max_steps": 2, "report_to": "none"}, "evaluate": {"generation": False}}
    return make_config(tmp_path / f"{name}.yaml", model, tmp_path / name, **sections)


def start(config: Path) -> int:
    """The exit code of a run."""
    return cli.guarded(lambda: cli.execute(config, [], dry_run=False))


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_goes_on_when_it_is_not(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert start(config_of(tmp_path, model, "whole")) == 0
    sizes = {path.name: path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    limits = sorted({1, *(sizes[name] - 1 for name in WATCHED)})
    assert len(limits) >= 5
    wanted = (whole / "adapter/adapter_model.safetensors").read_bytes()
    for limit in limits:
        folder, config = tmp_path / f"limit{limit}", config_of(tmp_path, model, f"limit{limit}")
        capsys.readouterr()
        with files_of_at_most(limit):
            code = start(config)
        said = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(said) == 1 and said[0].startswith("error: "), (limit, said)
        assert "File too large" in said[0] or "cannot be written" in said[0], (limit, said)
        assert start(config) == 0, (limit, capsys.readouterr().err)
        assert (folder / "adapter/adapter_model.safetensors").read_bytes() == wanted
