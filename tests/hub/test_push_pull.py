"""Push and pull over real HTTP and over a folder registry: the same promises of both."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from hub.helpers import Pico, pico_adapter
from hub.loopback import LoopbackHub
from speft_core import SparseAdapter, UserError
from speft_hub import CardFields, NotFound, parse, pull, push

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def logits(adapter: SparseAdapter) -> torch.Tensor:
    model = Pico()
    with adapter.applied(model), torch.no_grad():
        return model(X)


def test_a_pulled_adapter_gives_the_same_logits_at_main_and_at_a_sha(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    before = logits(SparseAdapter.load(adapter_dir))
    assert not torch.equal(before, Pico()(X))
    pushed = push(adapter_dir, address)
    assert pushed.changed
    for i, text in enumerate((address, f"{address}@{pushed.sha}", f"{address}@{pushed.sha[:8]}", f"{address}@main")):
        pulled = pull(text, tmp_path / f"copy{i}")
        assert pulled.sha == pushed.sha and pulled.fetched
        assert torch.equal(logits(SparseAdapter.load(pulled.path)), before)
        assert (pulled.path / "README.md").is_file() and (pulled.path / "density.svg").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")] == []


def test_a_second_push_keeps_history_and_an_old_sha_still_gives_the_old_adapter(
    address: str, adapter_dir: Path, tmp_path: Path
) -> None:
    first = push(adapter_dir, address)
    old = logits(SparseAdapter.load(adapter_dir))
    pico_adapter(seed=7).save(adapter_dir)
    second = push(adapter_dir, address, message="better")
    assert second.sha != first.sha and "adapter_model.safetensors" in second.changed
    reference = parse(address)
    history = reference.registry.history(reference.repo, second.sha)
    assert [c.sha for c in history][:2] == [second.sha, first.sha] and history[0].title == "better" and len(history) == 3
    assert torch.equal(logits(SparseAdapter.load(pull(f"{address}@{first.sha}", tmp_path / "old").path)), old)
    assert not torch.equal(logits(SparseAdapter.load(pull(address, tmp_path / "new").path)), old)


def test_pushing_twice_makes_one_commit(address: str, adapter_dir: Path) -> None:
    first = push(adapter_dir, address)
    again = push(adapter_dir, address)
    assert again.sha == first.sha and again.changed == [] and again.deleted == []


def test_only_an_adapters_own_files_are_sent_and_files_that_went_are_deleted(address: str, adapter_dir: Path) -> None:
    (adapter_dir / "notes.txt").write_text("private thoughts")
    (adapter_dir / "optimizer.pt").write_bytes(b"\x80\x04")
    (adapter_dir / ".env").write_text("SECRET=1")
    (adapter_dir / "training_config.yaml").write_text("train: {lr: 1.0}\n")
    pushed = push(adapter_dir, address)
    assert set(pushed.left_out) == {"notes.txt", "optimizer.pt", ".env"}
    reference = parse(address)
    tree = reference.registry.tree(reference.repo, pushed.sha)
    assert set(tree) - {".gitattributes"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "density.svg",
        "training_config.yaml",
    }
    (adapter_dir / "training_config.yaml").unlink()
    again = push(adapter_dir, address)
    assert again.deleted == ["training_config.yaml"]
    assert "training_config.yaml" not in reference.registry.tree(reference.repo, again.sha)


@pytest.mark.parametrize("name", ["adapter_config.json", "README.md", ".eval_results"])
def test_a_link_in_the_folder_is_refused(address: str, adapter_dir: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "id_rsa"
    if name.startswith("."):
        secret.mkdir()
    else:
        secret.write_text("{}")
    (adapter_dir / name).unlink(missing_ok=True)
    (adapter_dir / name).symlink_to(secret)
    with pytest.raises(UserError, match="is a link"):
        push(adapter_dir, address)


def test_a_token_in_a_file_is_not_published(address: str, adapter_dir: Path) -> None:
    (adapter_dir / "training_config.yaml").write_text("token: hf_" + "A" * 34 + "\n")
    with pytest.raises(UserError, match="access token"):
        push(adapter_dir, address)
    with pytest.raises(NotFound):
        pull(address)


def test_a_damaged_adapter_is_not_published(address: str, adapter_dir: Path) -> None:
    weights = adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError):
        push(adapter_dir, address)


def test_a_path_of_this_machine_is_not_published(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    text = (adapter_dir / "adapter_config.json").read_text().replace('"acme/pico"', '"/home/alice/models/pico-7b"')
    assert config["base_model_name_or_path"] == "acme/pico"
    (adapter_dir / "adapter_config.json").write_text(text)
    push(adapter_dir, address)
    pulled = pull(address, tmp_path / "copy").path
    for file in pulled.iterdir():
        assert b"/home/alice" not in file.read_bytes(), file.name
    assert SparseAdapter.load(pulled).config.base_model_name_or_path == "pico-7b"
    assert "base_model:" not in (pulled / "README.md").read_text()
    push(adapter_dir, address, fields=CardFields(base_model="acme/pico-7b"))
    again = pull(address, tmp_path / "copy", force=True).path
    assert SparseAdapter.load(again).config.base_model_name_or_path == "acme/pico-7b"
    assert "base_model: acme/pico-7b\nbase_model_relation: adapter\n" in (again / "README.md").read_text()


def test_pulling_again_fetches_nothing_and_another_folder_is_not_overwritten(
    address: str, adapter_dir: Path, tmp_path: Path
) -> None:
    push(adapter_dir, address)
    target = tmp_path / "copy"
    assert pull(address, target).fetched
    assert not pull(address, target).fetched
    (target / "README.md").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        pull(address, target)
    assert (target / "README.md").read_text() == "mine"
    assert pull(address, target, force=True).fetched
    assert (target / "README.md").read_text() != "mine"
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="no adapter"):
        pull(address, home, force=True)
    assert (home / "thesis.tex").exists()


def test_pull_does_not_write_through_links(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, address)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "copy").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        pull(address, tmp_path / "copy")
    real = tmp_path / "real"
    pull(address, real)
    (real / "density.svg").unlink()
    (real / "density.svg").symlink_to(elsewhere / "stolen")
    with pytest.raises(UserError, match="--force"):
        pull(address, real)
    pull(address, real, force=True)
    assert list(elsewhere.iterdir()) == [] and not (real / "density.svg").is_symlink()


def test_concurrent_pulls_into_one_folder(address: str, adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, address)
    results = []
    threads = [threading.Thread(target=lambda: results.append(pull(address, tmp_path / "copy"))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 6 and sum(r.fetched for r in results) == 1
    SparseAdapter.load(tmp_path / "copy")


def test_private_repositories(hub: LoopbackHub, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(adapter_dir, "alice/secret", private=True)
    assert hub.repos["alice/secret"].private
    assert pull("alice/secret", tmp_path / "a").fetched
    for token in ("", "hf_bob"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(NotFound, match="private"):
            pull("alice/secret", tmp_path / "b")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(UserError, match="403|rights"):
        push(adapter_dir, "alice/other")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match="hf auth login"):
        push(adapter_dir, "alice/other")
    assert not (tmp_path / "b").exists()


def test_a_private_folder_registry_is_closed_to_others(adapter_dir: Path, tmp_path: Path) -> None:
    push(adapter_dir, f"file://{tmp_path}/r/alice/secret", private=True)
    assert (tmp_path / "r/alice/secret").stat().st_mode & 0o077 == 0


def test_gated_repositories_say_so(
    hub: LoopbackHub, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(adapter_dir, "alice/gated")
    hub.repos["alice/gated"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(NotFound, match="gated"):
        pull("alice/gated", tmp_path / "b")


@pytest.mark.parametrize(
    "text", ["sst2", "a/b/c", "alice/..", "../alice", "alice/x@", "alice/x@a b", "file://host/x", "file:x", "alice/x@-v"]
)
def test_addresses_that_are_none(text: str, hub: LoopbackHub) -> None:
    with pytest.raises(UserError):
        parse(text)


def test_addresses_in_folders_may_have_odd_characters(adapter_dir: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/my%20r%40x/alice/sst2"
    push(adapter_dir, address, tag="v1")
    assert (tmp_path / "my r@x/alice/sst2/speft-registry.json").is_file()
    assert str(parse(address)) == address
    assert pull(f"{address}@v1", tmp_path / "copy").fetched
