"""What --force may replace: an adapter or a checkpoint, and nothing that lies among its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pico
from hub.exported import adapter_for
from speft_core import SparseAdapter, UserError
from speft_hub import pull, push
from speft_hub.combining import merge_adapters
from speft_hub.export import export
from speft_hub.names import check_place


def prepare(root: Path) -> dict[str, Callable[[], object]]:
    """Folders that hold what is to be replaced, and for each what would replace it."""
    base = pico.llama()
    base.save_pretrained(root / "base")
    adapter_for(base, str(root / "base")).save(root / "adapter")
    address = f"file://{root}/registry/me/a"
    push(root / "adapter", address)
    made = {
        "pulled": lambda: pull(address, root / "pulled", force=True),
        "merged": lambda: merge_adapters([str(root / "adapter")] * 2, root / "merged", force=True),
        "exported": lambda: export(root / "adapter", root / "exported", force=True),
    }
    for make in made.values():
        make()
    return made


@pytest.mark.parametrize("what", ["pulled", "merged", "exported"])
def test_what_lies_among_its_files_is_never_removed(tmp_path: Path, what: str) -> None:
    replace, folder = prepare(tmp_path)[what], tmp_path / what
    (folder / "README.md").write_text("mine")
    replace()
    assert (folder / "README.md").read_text() != "mine"  # what is its own goes
    for odd in ("notes.txt", ".git/HEAD", "checkpoint-100/model.safetensors", "heads/notes.txt", "config.json.d/x", "train.py"):
        (folder / odd).parent.mkdir(exist_ok=True)
        (folder / odd).write_text("mine")
        named = odd if odd.startswith("heads") else odd.partition("/")[0]
        with pytest.raises(UserError, match=f"{what} holds {named}, which is not the .*'s and is never removed"):
            replace()
        assert (folder / odd).read_text() == "mine"
        (folder / odd).unlink()
        if "/" in odd:
            (folder / odd).parent.rmdir()
        replace()


def test_a_folder_that_is_a_link_and_one_in_the_place_of_a_file(tmp_path: Path) -> None:
    replace, folder, elsewhere = prepare(tmp_path)["pulled"], tmp_path / "pulled", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.safetensors").write_text("mine")
    (folder / "heads").symlink_to(elsewhere)
    with pytest.raises(UserError, match="holds heads, which"):
        replace()
    (folder / "heads").unlink()
    (folder / "results.json").mkdir()
    (folder / "results.json/x").write_text("mine")
    with pytest.raises(UserError, match=r"holds results\.json, which"):
        replace()
    assert (elsewhere / "a.safetensors").read_text() == "mine"


def test_a_configuration_alone_is_no_checkpoint(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something that is no checkpoint"):
        export(tmp_path / "adapter", tmp_path / "settings", force=True)
    (tmp_path / "settings/model.safetensors").write_bytes(b"")
    export(tmp_path / "adapter", tmp_path / "settings", force=True)


def test_what_a_killed_save_left_is_the_adapters_own(tmp_path: Path) -> None:
    SparseAdapter({}, {}).save(tmp_path / "a")
    (tmp_path / "a" / ".adapter_model.safetensors.x3k_9q1z.partial").write_bytes(b"half")
    assert check_place(tmp_path / "a", force=True) == tmp_path / "a"
    (tmp_path / "a" / ".notes.txt.x3k_9q1z.partial").write_bytes(b"mine")
    with pytest.raises(UserError, match="notes"):
        check_place(tmp_path / "a", force=True)
