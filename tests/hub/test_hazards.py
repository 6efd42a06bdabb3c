"""A hostile Hub: each hazard that the client lets pass must be refused here, with nothing written outside the target.

The rows of the table in docs/hub.md, but for what the files themselves hold (test_hazards_contents.py) and sizes (test_hazards_sizes.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from hub.hostile import WEIGHTS, files_below, published, refuse, replace, target
from hub.loopback import LoopbackHub
from hub.loopback.store import git_oid
from speft_core import SparseAdapter, UserError
from speft_hub import NotFound, pull, push
from speft_hub.hub import check_endpoint
from speft_hub.names import ALLOWED, size_limit

__all__ = ["published", "target"]

# File names

HOSTILE_NAMES = [
    "../evil",
    "/etc/evil",
    "~/evil",
    ".git/config",
    "a//b",
    ".bashrc",
    "heads/../../evil.safetensors",
    "C:\\evil",
    "heads\\x.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
    "modeling_evil.py",
    "ADAPTER_CONFIG.JSON",
    "heads/a/b.safetensors",
    ".eval_results/../x.yaml",
    "README.md\n",
    "adapter_config.json\0",
    "heads/.safetensors",
    "adapter_model.safetensors.index.json",
    "",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_outside_the_list_are_never_asked_for(published: LoopbackHub, target: Path, name: str) -> None:
    assert size_limit(name) is None
    published.inject("tree", entries=[{"type": "file", "path": name, "size": 4, "oid": git_oid("blob", b"evil")}])
    assert pull("alice/sst2", target).fetched
    asked = [path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in published.requests if "/resolve/" in path]
    assert sorted(asked) == sorted(p.name for p in target.iterdir()) and WEIGHTS in asked


def test_an_honest_server_passes_every_check_below(published: LoopbackHub, target: Path) -> None:
    assert len(ALLOWED) > 5 and pull("alice/sst2", target).fetched


# A hostile endpoint


@pytest.mark.parametrize("etag", ["/tmp/speft_evil", "../../evil", "~/evil", '"' + "0" * 40 + '"', "x" * 5000])
def test_an_etag_is_no_file_name(published: LoopbackHub, target: Path, etag: str) -> None:
    published.inject("etag", "/resolve/", value=etag)
    root = target.parent.parent
    before = files_below(root)
    assert pull("alice/sst2", target).fetched
    assert {f for f in files_below(root) - before if not f.startswith("room/sst2")} == set()
    assert not Path("/tmp/speft_evil").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://hub.example",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "ftp://x",
        "file:///x",
        "http://10.0.0.1",
        "hub.example",
        "",
    ],
)
def test_a_token_is_not_sent_over_plain_http(url: str, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    with pytest.raises(UserError, match="HF_ENDPOINT must be https"):
        check_endpoint(url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(UserError, match="HF_ENDPOINT must be https"):
        pull("alice/sst2", target)
    assert [check_endpoint(u) for u in ("https://hub.example", "http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9")]


@pytest.mark.parametrize("to", ["http://hub.example/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "https://127.0.0.1/x", ""])
def test_redirects_to_anything_but_https_are_refused(
    published: LoopbackHub, target: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to.startswith("https://127"):  # a hub on the network may not lead us to services of this machine
        monkeypatch.setattr("speft_hub.hub.is_loopback", lambda url: ":9/" not in url + ":9/" or url.startswith("https://127"))
        monkeypatch.setattr("speft_hub.hub.check_endpoint", lambda url: url)
    published.inject("redirect", "GET /alice/sst2/resolve/", to=to)
    refuse(target, "redirect")


def test_redirects_end(published: LoopbackHub, target: Path) -> None:
    sha = published.repos["alice/sst2"].branches["main"]
    published.inject("redirect", "/resolve/", to=f"{published.url}/alice/sst2/resolve/{sha}/README.md")
    refuse(target, "redirects")


def test_the_token_stays_with_the_hub(published: LoopbackHub, target: Path) -> None:
    pull("alice/sst2", target)
    large = [token for _, path, token in published.requests if path.startswith("/lfs/get/")]
    small = [token for _, path, token in published.requests if "/resolve/" in path]
    assert large == [None] and set(small) == {"hf_alice"}


# Pinning


def test_another_commit_than_the_one_asked_for_is_refused(published: LoopbackHub, target: Path) -> None:
    sha = published.repos["alice/sst2"].branches["main"]
    published.inject("commit", "/resolve/", sha="b" * 40)
    refuse(target, "answered from 'bbbb")
    published.faults.clear()
    published.inject("commit", "/api/models/", sha="b" * 40)
    refuse(target, "answered with bbbb", address=f"alice/sst2@{sha}")


@pytest.mark.parametrize("sha", ["", "main", "../../x", "A" * 40, "a" * 39, None])
def test_a_revision_must_resolve_to_a_sha(published: LoopbackHub, target: Path, sha: str | None) -> None:
    published.inject("commit", "/api/models/", sha=sha)
    refuse(target, "no commit")


def test_a_push_during_a_pull_does_not_mix_two_adapters(
    published: LoopbackHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speft_hub.hub import HubRegistry

    first, resolve = published.repos["alice/sst2"].branches["main"], HubRegistry.resolve

    def then_someone_pushes(self: HubRegistry, repo: str, revision: str) -> str:
        sha = resolve(self, repo, revision)
        replace(published, {WEIGHTS: b"another adapter", "README.md": b"another card"})
        return sha

    monkeypatch.setattr(HubRegistry, "resolve", then_someone_pushes)
    assert pull("alice/sst2", target).sha == first != published.repos["alice/sst2"].branches["main"]
    SparseAdapter.load(target)
    assert {path.split("/resolve/")[1][:40] for _, path, _ in published.requests if "/resolve/" in path} == {first}


# Stale caches


@pytest.mark.parametrize("code", [401, 403, 404, 500, 503])
def test_an_earlier_copy_does_not_stand_in_for_an_answer(
    published: LoopbackHub, target: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    pull("alice/sst2", target.with_name("earlier"))
    published.inject("status", "/api/models/", code=code)
    refuse(target, str(code) if code >= 500 else "403|401|404|not found|no such")


def test_offline_mode_says_so(published: LoopbackHub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub import close_session

    close_session()
    try:
        refuse(target, "HF_HUB_OFFLINE")
    finally:
        monkeypatch.undo()
        close_session()


# Pickles


def test_pickles_are_neither_fetched_nor_needed(published: LoopbackHub, adapter_dir: Path, target: Path) -> None:
    replace(published, {"adapter_model.bin": b"\x80\x04evil", "pytorch_model.bin": b"\x80\x04evil"})
    assert pull("alice/sst2", target).fetched
    assert not any(p.suffix == ".bin" for p in target.iterdir())
    assert not any(".bin" in path for _, path, _ in published.requests)
    replace(published, {WEIGHTS: None, "adapter_model.bin": b"\x80\x04evil"})
    refuse(target.with_name("other"), "not an adapter")


# Tokens


def test_no_token_is_written_anywhere(hub: LoopbackHub, adapter_dir: Path, target: Path) -> None:
    push(adapter_dir, "alice/sst2")
    pull("alice/sst2", target)
    for file in [*target.rglob("*"), *adapter_dir.rglob("*")]:
        assert not file.is_file() or b"hf_alice" not in file.read_bytes()


def test_a_repository_that_is_no_adapter(hub: LoopbackHub, adapter_dir: Path, target: Path) -> None:
    push(adapter_dir, "alice/sst2")
    replace(hub, {"adapter_config.json": None, WEIGHTS: None})
    refuse(target, "is not an adapter")
    with pytest.raises(NotFound):
        pull("alice/none", target)


# The same for a folder registry


def test_a_damaged_folder_registry_is_seen(adapter_dir: Path, target: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry" / "sst2"
    address = f"file://{root}"
    pushed = push(adapter_dir, address)
    objects = [p for p in (root / "objects").rglob("*") if p.is_file()]
    weights = max(objects, key=lambda p: p.stat().st_size)
    honest = weights.read_bytes()
    for data, message in (
        (honest[:-1] + bytes([honest[-1] ^ 1]), "damaged or forged"),
        (honest + b"x", "more bytes"),
        (honest[:50], "cut short"),
    ):
        weights.write_bytes(data)
        refuse(target, message, address)
    weights.unlink()
    weights.symlink_to("/etc/hostname")
    refuse(target, "cannot be read", address)
    weights.unlink()
    weights.write_bytes(honest)
    commit = root / "commits" / f"{pushed.sha}.json"
    text = commit.read_text()
    commit.write_text(text.replace("README.md", "../../evil"))
    refuse(target, "damaged", address)
    commit.write_text(text)
    assert pull(address, target).fetched
