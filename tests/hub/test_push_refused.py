"""A push that is refused has changed nothing: no commit, no empty repository, no file of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.helpers import pico_adapter
from speft_core import SparseAdapter, UserError
from speft_hub import NotFound, parse, pull, push
from speft_hub.combining import write_card
from speft_hub.evaluation import EVAL_RESULTS, read_results


def state(address: str) -> tuple[str, dict[str, str], dict[str, str]]:
    reference = parse(address)
    there = reference.registry.references(reference.repo)
    return reference.registry.resolve(reference.repo, "main"), there.branches, there.tags


def test_a_tag_that_is_taken_is_told_before_the_commit(address: str, adapter_dir: Path) -> None:
    push(adapter_dir, address, tag="v1")
    push(adapter_dir, address, branch="dev")
    before = state(address)
    assert push(adapter_dir, address, tag="v1").sha == before[0]  # nothing changed: the tag is there already
    pico_adapter(seed=5).save(adapter_dir)
    for options, message in (
        ({"tag": "v1"}, "has a tag 'v1' at .* already; tags do not move"),
        ({"tag": "v1", "branch": "new"}, "tags do not move"),
        ({"tag": "main"}, "has 'main' already, as a branch"),
        ({"tag": "dev"}, "has 'dev' already, as a branch"),
        ({"tag": "new", "branch": "new"}, "has 'new' already, as a branch"),
    ):
        with pytest.raises(UserError, match=message):
            push(adapter_dir, address, **options)
        assert state(address) == before
    done = push(adapter_dir, address, tag="v2", branch="new")
    assert state(address)[2].keys() == {"v1", "v2"} and state(address)[1]["new"] == done.sha


def test_a_first_push_whose_tag_is_its_branch_makes_no_repository(address: str, adapter_dir: Path) -> None:
    with pytest.raises(UserError, match="has 'main' already"):
        push(adapter_dir, address, tag="main")
    with pytest.raises(NotFound):
        state(address)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"---\nlicense: [mit\n---\n\nMine.\n", "not readable YAML"),
        (b"---\ndate: 2024-13-45\n---\n\nMine.\n", "not readable YAML"),
        (b"---\n- mit\n---\n", "must be a mapping"),
        (b"caf\xe9\n", "README.md must be UTF-8 text"),
    ],
)
def test_a_card_that_cannot_be_read_makes_no_repository(
    address: str, adapter_dir: Path, content: bytes, message: str, tmp_path: Path
) -> None:
    (adapter_dir / "README.md").write_bytes(content)
    with pytest.raises(UserError, match=message):
        push(adapter_dir, address)
    with pytest.raises(NotFound):
        state(address)
    with pytest.raises(UserError, match=message):
        write_card(adapter_dir, "alice/sst2")
    assert (adapter_dir / "README.md").read_bytes() == content


@pytest.mark.parametrize("content, message", [(b"name: caf\xe9\n", "must be UTF-8 text"), (b"x: 2024-13-45\n", "not readable YAML")])
def test_a_training_configuration_that_cannot_be_read(address: str, adapter_dir: Path, content: bytes, message: str) -> None:
    (adapter_dir / "training_config.yaml").write_bytes(content)
    (adapter_dir / "results.json").write_text('{"adapted": {"accuracy": 0.5}}')
    with pytest.raises(UserError, match=f"training_config.yaml.*{message}"):
        push(adapter_dir, address)
    assert read_results(adapter_dir / "results.json", adapter_dir)[0].dataset == "unnamed"


def test_figures_of_others_stay(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    """`.eval_results` is a folder of the Hub's, to which any tool may add a file."""
    push(adapter_dir, address)
    reference = parse(address)
    head = reference.registry.resolve(reference.repo, "main")
    add = {".eval_results/theirs.yaml": b"[]\n", EVAL_RESULTS: b"[]\n", "results.json": b"{}"}
    reference.registry.commit(reference.repo, "main", head, add, [], "figures")
    pico_adapter(seed=3).save(adapter_dir)
    assert push(adapter_dir, address).deleted == [EVAL_RESULTS, "results.json"]  # ours, which the folder has no more
    copy = pull(address, tmp_path / "copy").path
    assert (copy / ".eval_results/theirs.yaml").read_text() == "[]\n" and not (copy / EVAL_RESULTS).exists()
    assert SparseAdapter.load(copy).nnz == 40
