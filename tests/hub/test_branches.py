"""Who may move what: branches, tags and parents, and several pushes at once."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hub.helpers import pico_adapter
from speft_core import UserError
from speft_hub import NotFound, StaleParent, parse, pull, push
from speft_hub.addresses import Reference
from speft_hub.folder import FolderRegistry


def test_a_stale_parent_is_refused(address: str, adapter_dir: Path) -> None:
    first = push(adapter_dir, address)
    pico_adapter(seed=1).save(adapter_dir)
    second = push(adapter_dir, address)
    pico_adapter(seed=2).save(adapter_dir)
    with pytest.raises(StaleParent, match="someone pushed"):
        push(adapter_dir, address, parent=first.sha)
    reference = parse(address)
    assert reference.registry.resolve(reference.repo, "main") == second.sha


def test_of_two_pushes_at_once_one_wins_and_the_other_is_told(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, address)
    folders = []
    for seed in (1, 2, 3):
        pico_adapter(seed=seed).save(tmp_path / f"a{seed}")
        folders.append(tmp_path / f"a{seed}")
    start, outcomes = threading.Barrier(3), []

    def go(folder: Path) -> None:
        start.wait()
        try:
            outcomes.append(push(folder, address).sha)
        except StaleParent:
            outcomes.append("stale")

    threads = [threading.Thread(target=go, args=(f,)) for f in folders]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    shas = [o for o in outcomes if o != "stale"]
    reference = parse(address)
    history = [c.sha for c in reference.registry.history(reference.repo, reference.registry.resolve(reference.repo, "main"))]
    assert len(outcomes) == 3 and shas and set(shas) <= set(history) and len(history) == 2 + len(shas)
    assert pull(address, tmp_path / "won").sha in shas


def test_a_repository_that_two_make_at_once_is_made_once(tmp_path: Path) -> None:
    """Both find no repository; the second gets the lock after the first has pushed on top of the first commit."""
    repo, registry = str(tmp_path / "reg/alice/sst2"), FolderRegistry()
    Path(repo).mkdir(parents=True)
    late = threading.Thread(target=registry.create, args=(repo, False))
    with FileLock(Path(repo) / ".lock"):  # hold both at the door
        late.start()
        time.sleep(0.3)
        assert late.is_alive()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FolderRegistry, "_locked", lambda *_: nullcontext())  # this thread has the lock already
            registry.create(repo, False)
            first = registry.resolve(repo, "main")
            sha = registry.commit(repo, "main", first, {"README.md": b"mine"}, [], "mine")
    late.join()
    assert registry.resolve(repo, "main") == sha and [c.sha for c in registry.history(repo, sha)] == [sha, first]


@pytest.mark.parametrize("branch", ["main", "try/one"])
def test_of_two_first_pushes_at_once_one_wins_and_the_other_is_told(address: str, tmp_path: Path, branch: str) -> None:
    """All look for the branch before any makes it; who comes second must not go on top of what it never saw."""
    reference = parse(address)
    if branch != "main":
        pico_adapter(seed=9).save(tmp_path / "start")
        push(tmp_path / "start", address)
    looked, outcomes = threading.Barrier(3, timeout=30), {}

    class Together:
        """The registry, but the first look waits for the others'."""

        def __init__(self) -> None:
            self.first = True

        def __getattr__(self, name: str) -> Any:
            return getattr(reference.registry, name)

        def resolve(self, repo: str, revision: str) -> str:
            try:
                return reference.registry.resolve(repo, revision)
            finally:
                if self.first:
                    self.first = False
                    looked.wait()

    def go(seed: int) -> None:
        pico_adapter(seed=seed).save(tmp_path / f"a{seed}")
        try:
            outcomes[seed] = push(tmp_path / f"a{seed}", Reference(Together(), reference.repo), branch=branch).sha
        except StaleParent as error:
            assert "pull and push again" in str(error)
            outcomes[seed] = "told"

    threads = [threading.Thread(target=go, args=(seed,)) for seed in (1, 2, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    (winner,) = (sha for sha in outcomes.values() if sha != "told")
    assert len(outcomes) == 3 and reference.registry.resolve(reference.repo, branch) == winner


def test_a_push_goes_to_a_branch_and_moves_no_tag(adapter_dir: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/registry/alice/sst2"
    main = push(adapter_dir, address, tag="v1")
    pico_adapter(seed=5).save(adapter_dir)
    for revision in ("v1", main.sha[:9]):
        with pytest.raises(UserError, match=f"'{revision}' is no branch"):
            push(adapter_dir, f"{address}@{revision}")
    assert pull(f"{address}@v1", tmp_path / "a").sha == main.sha == pull(address, tmp_path / "b").sha
    for name in ("main", "v1"):
        with pytest.raises(UserError, match=f"has '{name}' already|'{name}' is no branch|tags do not move"):
            push(adapter_dir, address, **({"tag": name} if name == "main" else {"branch": name}))


def test_a_parent_may_be_short(address: str, adapter_dir: Path) -> None:
    first = push(adapter_dir, address)
    pico_adapter(seed=1).save(adapter_dir)
    assert push(adapter_dir, address, parent=first.sha[:9]).sha != first.sha


def test_a_repository_within_another_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, f"file://{tmp_path}/registry/alice/sst2")
    for inside in ("deep", "refs/heads/deep"):
        with pytest.raises(UserError, match="lies within the repository"):
            push(adapter_dir, f"file://{tmp_path}/registry/alice/sst2/{inside}")


def test_branches_and_tags(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    main = push(adapter_dir, address, tag="v1")
    pico_adapter(seed=5).save(adapter_dir)
    tried = push(adapter_dir, address, branch="try/one")
    assert pull(f"{address}@try/one", tmp_path / "a").sha == tried.sha != main.sha
    assert pull(f"{address}@v1", tmp_path / "b").sha == main.sha == pull(address, tmp_path / "c").sha
    reference = parse(address)
    references = reference.registry.references(reference.repo)
    assert set(references.branches) == {"main", "try/one"} and set(references.tags) == {"v1"}
    with pytest.raises(UserError, match="tags do not move"):
        push(adapter_dir, address, tag="v1")
    with pytest.raises(NotFound):
        pull(f"{address}@v2", tmp_path / "d")
