"""A hostile Hub: adapters whose digests are right and whose contents are not; only the checks of the adapter itself see them."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub.hostile import WEIGHTS, published, refuse, replace, target
from hub.loopback import LoopbackHub

__all__ = ["published", "target"]


def with_tensors(folder: Path, change: Any) -> bytes:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata={"format": "pt"})
    return (folder / "changed.safetensors").read_bytes()


NAME, COUNT = "layers.0.weight", 20


def gaps_of_ones(width: int) -> torch.Tensor:
    """COUNT gaps whose remainders are `width` bytes of ones, with high parts of zero."""
    return torch.tensor([width] + [255] * (COUNT * width) + [0] * ((COUNT + 7) // 8), dtype=torch.uint8)


@pytest.mark.parametrize(
    "what, change",
    [
        ("gaps past the end", lambda t: t.update({f"{NAME}.gaps": gaps_of_ones(4)})),
        ("gaps that are -1 as int64", lambda t: t.update({f"{NAME}.gaps": gaps_of_ones(8)})),
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
    "change, match",
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format": "peft"}, "must be a speft adapter"),
        ({"tensors": None}, "not a readable adapter"),
        ({"tensors": []}, "not a readable adapter"),
        ({"tensors": {}}, "does not list"),
    ],
)
def test_hostile_configurations(
    published: LoopbackHub, adapter_dir: Path, target: Path, change: dict[str, Any], match: str
) -> None:
    replace(published, {"adapter_config.json": config_of(adapter_dir, **change)})
    refuse(target, match)


@pytest.mark.parametrize("shape, match", [([-1, 5], "no negative sizes"), ([1], "at most 1 of them"), ("x", "readable adapter")])
def test_hostile_shapes(published: LoopbackHub, adapter_dir: Path, target: Path, shape: Any, match: str) -> None:
    tensors = json.loads(config_of(adapter_dir))["tensors"]
    tensors[NAME]["shape"] = shape
    replace(published, {"adapter_config.json": config_of(adapter_dir, tensors=tensors)})
    refuse(target, match)


def test_random_masks_do_not_make_us_draw_without_bound(published: LoopbackHub, adapter_dir: Path, target: Path) -> None:
    huge = {NAME: {"shape": [1 << 17, 1 << 16]}}
    for density in (1.0, 0.5, 1e-9, float("nan")):
        random = {"seed": 1, "mode": "bernoulli", "density": density}
        weights = with_tensors(
            adapter_dir, lambda t: (t.pop(f"{NAME}.gaps"), t.pop("layers.1.weight.gaps"), t.pop("layers.1.weight.values"))
        )
        replace(published, {"adapter_config.json": config_of(adapter_dir, random=random, tensors=huge), WEIGHTS: weights})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refuse(target, "no Bernoulli draw")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_huge_header_is_refused(published: LoopbackHub, target: Path) -> None:
    replace(published, {WEIGHTS: (1 << 62).to_bytes(8, "little") + b"{}" + b" " * 100})
    refuse(target, "readable adapter")
