"""A file that cannot be opened is said to be so, and not to be missing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from speft_core import SparseAdapter, SparseDelta, SparsityMask, UserError
from speft_core.merge_files import merge_folders
from speft_core.multihead_files import load_heads, save_heads

NOBODY = 65534
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder that any user may look into, with an adapter of two heads and a mask in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    delta = SparseDelta(torch.tensor([1, 3], dtype=torch.int32), torch.ones(2), (4,))
    SparseAdapter({"w": delta}).save(folder / "a")
    save_heads(folder / "a", {"one": {"score.weight": torch.ones(2, 2)}}, {"one": "classification"})
    SparsityMask({"w": delta.indices_K}, {"w": (4,)}, {}).save(folder / "mask.safetensors")
    yield folder
    shutil.rmtree(folder)


@contextmanager
def nobody() -> Iterator[None]:
    """Root may read everything: be somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "load": (MODEL, lambda room: SparseAdapter.load(room / "a")),
    "load config": (CONFIG, lambda room: SparseAdapter.load(room / "a")),
    "merge": (MODEL, lambda room: merge_folders([room / "a"], room / "out")),
    "heads": ("heads/one.safetensors", lambda room: load_heads(room / "a")),
    "heads list": ("heads.json", lambda room: load_heads(room / "a")),
    "mask": ("../mask.safetensors", lambda room: SparsityMask.load(room / "mask.safetensors")),
}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users as of Unix")
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_may_not_be_read(room: Path, reader: str) -> None:
    file, read = READERS[reader]
    (room / "a" / file).chmod(0)
    with nobody(), pytest.raises(UserError, match="Permission denied$") as caught:
        read(room)
    assert "No such file" not in str(caught.value) and "missing" not in str(caught.value)
    assert Path(file).name in str(caught.value) and not (room / "out").exists()


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_in_place_of_a_file(room: Path, reader: str) -> None:
    file, read = READERS[reader]
    (room / "a" / file).unlink()
    (room / "a" / file).mkdir()
    with pytest.raises(UserError, match="Is a directory$"):
        read(room)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(room: Path) -> None:
    (room / "a" / MODEL).unlink()
    os.mkfifo(room / "a" / MODEL)
    with pytest.raises(UserError, match="Not a regular file$"):
        SparseAdapter.load(room / "a")


@pytest.mark.parametrize("reader", [name for name in READERS if "config" not in name and "list" not in name])
def test_a_cut_file_is_damaged_and_a_missing_one_missing(room: Path, reader: str) -> None:
    file, read = READERS[reader]
    place = room / "a" / file
    place.write_bytes(place.read_bytes()[:-3])
    with pytest.raises(UserError, match="incomplete metadata|InvalidHeader|not fully covered"):
        read(room)
    place.unlink()
    with pytest.raises(UserError, match=r"missing$|^no mask at "):
        read(room)
