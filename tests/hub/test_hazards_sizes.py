"""A hostile Hub: more bytes than it said, endless listings, flipped bits, dropped connections."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hub.hostile import WEIGHTS, published, refuse, target
from hub.loopback import LoopbackHub
from speft_core import SparseAdapter
from speft_hub import pull

__all__ = ["published", "target"]

# Sizes


def test_more_bytes_than_listed_are_not_written(published: LoopbackHub, target: Path) -> None:
    published.inject("flood", WEIGHTS, extra=300 << 20)
    refuse(target, "more bytes came")
    assert published.flooded < 100 << 20  # the connection was closed long before the end


def test_more_bytes_than_announced_are_not_written(published: LoopbackHub, target: Path) -> None:
    published.inject("flood", WEIGHTS, extra=1 << 20, announce=1 << 40)
    refuse(target, "more bytes came")


@pytest.mark.parametrize("name, size", [("README.md", 2 << 20), ("adapter_config.json", 100 << 20), (WEIGHTS, 1 << 40)])
def test_listed_sizes_are_capped_by_kind(published: LoopbackHub, target: Path, name: str, size: int) -> None:
    files = [
        b.entry(p)
        for p, b in published.repos["alice/sst2"].commits[published.repos["alice/sst2"].branches["main"]].tree.items()
        if p != name
    ]
    published.inject("tree", entries=[*files, {"type": "file", "path": name, "size": size, "oid": "0" * 40}], replace=True)
    refuse(target, "at most")
    assert not any("/resolve/" in path for _, path, _ in published.requests)


def test_the_sum_is_capped(published: LoopbackHub, target: Path) -> None:
    refuse(target, "--max-bytes", max_bytes=100)


def test_a_full_disk_is_seen_before_anything_is_fetched(
    published: LoopbackHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
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
