"""A hostile Hub: each hazard that the client lets pass must be refused here, with nothing written outside the target."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub.loopback import LoopbackHub
from hub.loopback.store import Blob, git_oid, large_blob
from speft_core import SparseAdapter, UserError
from speft_hub import NotFound, pull, push
from speft_hub.hub import check_endpoint
from speft_hub.names import ALLOWED, size_limit

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def published(hub: LoopbackHub, adapter_dir: Path) -> LoopbackHub:
    """The loopback Hub with an honest adapter in alice/sst2."""
    push(adapter_dir, "alice/sst2")
    hub.requests.clear()
    return hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a pull writes: a folder of its own, so that anything beside it is seen."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room" / "sst2"


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} - {"room/.sst2.lock"}


def refuse(target: Path, match: str, address: str = "alice/sst2", **options: Any) -> None:
    """The pull fails with one line, and what the disk holds is what it held before."""
    root = target.parent.parent
    before = files_below(root)
    with pytest.raises(UserError, match=match) as caught:
        pull(address, target, **options)
    assert "\n" not in str(caught.value)
    assert files_below(root) == before
    assert not target.exists()


def replace(hub: LoopbackHub, files: dict[str, bytes | None], repo: str = "alice/sst2") -> None:
    """Put a commit on main as an attacker with write access would."""
    import hashlib

    tree = dict(hub.repos[repo].commits[hub.repos[repo].branches["main"]].tree)
    for name, data in files.items():
        if data is None:
            tree.pop(name)
        elif name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            hub.large[sha256] = data
            tree[name] = large_blob(sha256, len(data))
        else:
            tree[name] = Blob(data)
    hub.repos[repo].add_commit("main", tree, "attack", "", "mallory")


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


# Sizes


def test_more_bytes_than_listed_are_not_written(published: LoopbackHub, target: Path) -> None:
    published.inject("flood", WEIGHTS, extra=300 << 20)
    refuse(target, "more bytes came")
    assert published.flooded < 100 << 20  # the connection was closed long before the end


def test_more_bytes_than_announced_are_not_written(published: LoopbackHub, target: Path) -> None:
    size = published.repos["alice/sst2"].commits[published.repos["alice/sst2"].branches["main"]].tree[WEIGHTS].size
    published.inject("flood", WEIGHTS, extra=1 << 20, announce=1 << 40)
    refuse(target, "more bytes came")
    assert size < 1 << 20


@pytest.mark.parametrize("name, size", [("README.md", 2 << 20), ("adapter_config.json", 100 << 20), (WEIGHTS, 1 << 40)])
def test_listed_sizes_are_capped_by_kind(published: LoopbackHub, target: Path, name: str, size: int) -> None:
    published.inject("tree", entries=[{"type": "file", "path": name, "size": size, "oid": "0" * 40}])
    files = [
        b.entry(p)
        for p, b in published.repos["alice/sst2"].commits[published.repos["alice/sst2"].branches["main"]].tree.items()
        if p != name
    ]
    published.faults.clear()
    published.inject("tree", entries=[*files, {"type": "file", "path": name, "size": size, "oid": "0" * 40}], replace=True)
    refuse(target, "at most")
    assert not any("/resolve/" in path for _, path, _ in published.requests)


def test_the_sum_is_capped(published: LoopbackHub, target: Path) -> None:
    refuse(target, "--max-bytes", max_bytes=100)


def test_a_full_disk_is_seen_before_anything_is_fetched(
    published: LoopbackHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((1, 1)) and type("U", (), {"free": 10})())
    refuse(target, "are free")
    assert not any("/resolve/" in path for _, path, _ in published.requests)


@pytest.mark.parametrize(
    "entry",
    [
        {"size": -1, "oid": "0" * 40},
        {"size": 5, "oid": "../../x"},
        {"size": 5, "oid": "0" * 39},
        {"size": "5", "oid": "0" * 40},
        {"size": 5, "oid": "0" * 40, "lfs": {"oid": "zz", "size": 5, "pointerSize": 1}},
        {"size": 5, "oid": "0" * 40, "lfs": {"oid": "0" * 64, "size": 6, "pointerSize": 1}},
    ],
)
def test_listings_that_cannot_be(published: LoopbackHub, target: Path, entry: dict[str, Any]) -> None:
    published.inject("tree", entries=[{"type": "file", "path": "training_config.yaml"} | entry])
    refuse(target, "cannot be")


def test_a_tree_without_end_is_left(published: LoopbackHub, target: Path) -> None:
    published.inject("tree", entries=[{"type": "file", "path": f"{i}.txt", "size": 1, "oid": "0" * 40} for i in range(3000)])
    published.inject("pages")
    refuse(target, "more than")


# Integrity


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "README.md"])
def test_a_flipped_bit_is_seen(published: LoopbackHub, target: Path, name: str) -> None:
    published.inject("corrupt", name)
    refuse(target, "damaged or forged")


def test_dropped_connections_are_resumed(published: LoopbackHub, target: Path) -> None:
    fault = published.inject("cut", WEIGHTS, times=3, after=100)
    assert pull("alice/sst2", target).fetched and fault.seen == 3
    SparseAdapter.load(target)


def test_a_server_that_always_drops_is_given_up(published: LoopbackHub, target: Path) -> None:
    published.inject("cut", WEIGHTS, after=0)
    refuse(target, "gave up")


def test_busy_servers_are_asked_again(published: LoopbackHub, target: Path) -> None:
    fault = published.inject("status", "/resolve/", times=2, code=503)
    assert pull("alice/sst2", target).fetched and fault.seen == 2


# Contents: all with right digests, so only the checks of the adapter itself can see them


def with_tensors(folder: Path, change: Any) -> bytes:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata={"format": "pt"})
    return (folder / "changed.safetensors").read_bytes()


NAME = "layers.0.weight"


@pytest.mark.parametrize(
    "what, change",
    [
        (
            "gaps past the end",
            lambda t: t.update(
                {
                    f"{NAME}.gaps": torch.cat(
                        [
                            torch.tensor([8], dtype=torch.uint8),
                            torch.full((20 * 8,), 255, dtype=torch.uint8),
                            torch.zeros(3, dtype=torch.uint8),
                        ]
                    )
                }
            ),
        ),
        (
            "gaps below zero",
            lambda t: t.update(
                {
                    f"{NAME}.gaps": torch.cat(
                        [
                            torch.tensor([4], dtype=torch.uint8),
                            torch.full((20 * 4,), 255, dtype=torch.uint8),
                            torch.zeros(3, dtype=torch.uint8),
                        ]
                    )
                }
            ),
        ),
        ("gaps cut", lambda t: t.update({f"{NAME}.gaps": t[f"{NAME}.gaps"][:-2].clone()})),
        ("gaps of zero", lambda t: t.update({f"{NAME}.gaps": torch.zeros_like(t[f"{NAME}.gaps"])})),
        ("not a number", lambda t: t[f"{NAME}.values"].__setitem__(3, float("nan"))),
        ("infinite", lambda t: t[f"{NAME}.values"].__setitem__(3, float("inf"))),
        ("integers", lambda t: t.update({f"{NAME}.values": t[f"{NAME}.values"].long()})),
        ("a value too many", lambda t: t.update({f"{NAME}.values": torch.ones(21)})),
        ("a value missing", lambda t: t.update({f"{NAME}.values": torch.ones(19)})),
        ("another shape", lambda t: t.update({f"{NAME}.values": torch.ones(4, 5)})),
        ("values gone", lambda t: t.pop(f"{NAME}.values")),
        ("gaps gone", lambda t: t.pop(f"{NAME}.gaps")),
        ("a stranger", lambda t: t.update({"stranger": torch.ones(2)})),
        ("a head of nan", lambda t: t["dense.score.weight"].fill_(float("nan"))),
    ],
)
def test_hostile_contents(published: LoopbackHub, adapter_dir: Path, target: Path, what: str, change: Any) -> None:
    replace(published, {WEIGHTS: with_tensors(adapter_dir, change)})
    refuse(target, "adapter|gaps|indices|values|finite|lists")


def config_of(adapter_dir: Path, **change: Any) -> bytes:
    return json.dumps(json.loads((adapter_dir / "adapter_config.json").read_text()) | change).encode()


@pytest.mark.parametrize(
    "config",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b'{"format_version": 1' + b"0" * 5000 + b"}",
    ],
)
def test_hostile_json(published: LoopbackHub, target: Path, config: bytes) -> None:
    replace(published, {"adapter_config.json": config})
    refuse(target, "adapter_config.json|adapter|readable")


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"format_version": "1"},
        {"format": "peft"},
        {"tensors": None},
        {"tensors": {NAME: {"shape": [-1, 5]}}},
        {"tensors": {NAME: {"shape": [1 << 70]}}},
        {"tensors": {NAME: {"shape": "x"}}},
        {"tensors": {}},
        {"tensors": []},
    ],
)
def test_hostile_configurations(published: LoopbackHub, adapter_dir: Path, target: Path, change: dict[str, Any]) -> None:
    replace(published, {"adapter_config.json": config_of(adapter_dir, **change)})
    refuse(target, ".")


def test_random_masks_do_not_make_us_draw_without_bound(published: LoopbackHub, adapter_dir: Path, target: Path) -> None:
    huge = {NAME: {"shape": [1 << 17, 1 << 16]}}
    for density in (1.0, 0.5, 1e-9, float("nan")):
        random = {"seed": 1, "mode": "bernoulli", "density": density}
        weights = with_tensors(
            adapter_dir, lambda t: (t.pop(f"{NAME}.gaps"), t.pop("layers.1.weight.gaps"), t.pop("layers.1.weight.values"))
        )
        replace(published, {"adapter_config.json": config_of(adapter_dir, random=random, tensors=huge), WEIGHTS: weights})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refuse(target, ".")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_huge_header_is_refused(published: LoopbackHub, target: Path) -> None:
    replace(published, {WEIGHTS: (1 << 62).to_bytes(8, "little") + b"{}" + b" " * 100})
    refuse(target, "readable adapter")


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
