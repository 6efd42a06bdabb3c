"""Two thousand corrupted adapter folders: each is refused with one line, or loads as what it says it is."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub.helpers import Pico, pico_adapter
from speft_core import MultiHeadModel, SparseAdapter, UserError
from speft_hub import check_folder
from speft_hub.describe import describe

CASES = 2000
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "heads.json", "heads/sst2.safetensors", "config.json")


def flip(data: bytes, dice: random.Random) -> bytes:
    """A few bits anywhere."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def flip_front(data: bytes, dice: random.Random) -> bytes:
    """Bits of the header, where lengths and offsets are."""
    return flip(data[: min(len(data), 400)], dice) + data[400:]


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def grow(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.choice((1, 8, 5000)))


def shuffle(data: bytes, dice: random.Random) -> bytes:
    """Two stretches exchanged."""
    size = dice.choice((1, 4, 32))
    a, b = (dice.randrange(max(1, len(data) - size)) for _ in range(2))
    changed = bytearray(data)
    changed[a : a + size], changed[b : b + size] = data[b : b + size], data[a : a + size]
    return bytes(changed)


def zeros(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    return data[:start] + bytes(min(len(data) - start, dice.choice((1, 8, 200)))) + data[start + 200 :]


def header(data: bytes, dice: random.Random) -> bytes:
    """A header length that lies."""
    length = dice.choice((0, 1, 7, len(data), len(data) - 8, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
    return length.to_bytes(8, "little") + data[8:]


def bomb(data: bytes, dice: random.Random) -> bytes:
    """JSON that is deep, long, or holds huge numbers."""
    return dice.choice(
        (
            b"[" * 200_000,
            b'{"a":' * 100_000,
            b'{"x": ' + b"9" * 100_000 + b"}",
            b'{"tensors": {' + b'"a": {},' * 50_000 + b'"a": {}}}',
            b"null",
            b"{}",
            b"",
        )
    )


def number(data: bytes, dice: random.Random) -> bytes:
    """One digit of the text becomes a number that hurts."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not digits:
        return flip(data, dice)
    at = dice.choice(digits)
    return (
        data[:at]
        + dice.choice(
            (
                b"-1",
                b"1e999",
                b"NaN",
                b"4294967296",
                b"9223372036854775807",
                b"1" + b"0" * 30,
                b"0",
                b"null",
                b'"x"',
                b"[]",
                b"{}",
                b"true",
            )
        )
        + data[at + 1 :]
    )


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip,
    flip_front,
    cut,
    grow,
    shuffle,
    zeros,
    header,
    bomb,
    number,
    number,
)


def attack_tensors(folder: Path, dice: random.Random) -> None:
    """Tensors swapped, retyped, reshaped, dropped, added or given hostile values, in a well-formed file."""
    path = folder / dice.choice((WEIGHTS, WEIGHTS, WEIGHTS, "heads/sst2.safetensors"))
    tensors = load_file(path)
    name, other = dice.choice(sorted(tensors)), dice.choice(sorted(tensors))
    tensor = tensors[name]
    what = dice.randrange(9)
    if what == 0:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif what == 1:
        tensors[name] = tensor.to(dice.choice((torch.int64, torch.float64, torch.uint8, torch.bool, torch.float16)))
    elif what == 2:
        tensors[name] = tensor.reshape(-1)[: dice.randrange(tensor.numel())].clone()
    elif what == 3:
        del tensors[name]
    elif what == 4:
        tensors[dice.choice(("stranger", name + ".values", "dense." + name, "x.gaps"))] = tensor.clone()
    elif what == 5:
        flat = tensor.reshape(-1).clone()
        flat[dice.randrange(len(flat))] = (
            dice.choice((255, 128, 0)) if tensor.dtype == torch.uint8 else dice.choice((float("nan"), float("inf"), -1e30))
        )
        tensors[name] = flat.reshape(tensor.shape)
    elif what == 6:
        tensors[name] = torch.randint(0, 256, (dice.randrange(1, 300),), dtype=torch.uint8)
    elif what == 7:
        tensors[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    else:
        tensors[name] = tensor.reshape(1, *tensor.shape).clone()
    save_file(tensors, path, metadata={"format": "pt"})


def attack_config(folder: Path, dice: random.Random) -> None:
    """A well-formed configuration that lies."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    names = sorted(config["tensors"])
    shape = dice.choice(
        (
            [1 << 40, 1 << 40],
            [0, 5],
            [-12, -12],
            [12.5, 12],
            [144],
            [],
            ["12", "12"],
            [1 << 20, 1 << 20],
            [3, 3],
            None,
            [[12], 12],
            [1 << 70],
        )
    )
    random_ = dice.choice(
        (
            {"seed": 0, "mode": "exact"},
            {"seed": 0, "mode": "bernoulli", "density": dice.choice((1.0, 0.14, 1e-9, 2, "x"))},
            {"seed": "x"},
            {"mode": "no"},
            [],
            7,
        )
    )
    dice.choice(
        (
            lambda: config["tensors"][names[0]].update(shape=shape),
            lambda: config["tensors"].update({dice.choice(("../x", "ghost", "", "a\0b")): {"shape": [2, 2]}}),
            lambda: config["tensors"].pop(names[0]),
            lambda: config.update(random=random_, tensors={n: {"shape": shape} for n in names}),
            lambda: config.update({dice.choice(sorted(config)): dice.choice((None, [], {}, "x", -1, 1e999, {"a": {"b": []}}))}),
            lambda: config.update(format_version=dice.choice((0, 2, -1, "1", None, 1.5, True))),
        )
    )()
    path.write_text(json.dumps(config))
    if dice.random() < 0.5:
        weights = load_file(folder / WEIGHTS)
        save_file({k: v for k, v in weights.items() if not k.endswith(".gaps")}, folder / WEIGHTS, metadata={"format": "pt"})


def check_loaded(folder: Path, adapter: SparseAdapter) -> None:
    """What loaded must be consistent: in range, sorted, finite; and usable without touching anything else."""
    adapter.check()
    for delta in adapter.deltas.values():
        assert delta.indices_K.numel() == delta.values_K.numel()
    described = describe(folder)
    assert described["parameters"] == adapter.nnz
    model = Pico()
    before = [p.clone() for p in model.parameters()]
    try:
        adapter.apply(model).restore()
    except UserError:
        pass
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_corrupted_folders_are_refused_or_loaded_right(tmp_path: Path) -> None:
    dice = random.Random(2026)
    whole, room = tmp_path / "whole", tmp_path / "room"
    model = Pico()
    heads = {"sst2": {"score.weight": torch.randn(3, 12)}}
    with MultiHeadModel(model, pico_adapter(), heads) as many:
        many.save(whole)
    pico_adapter().save(whole)  # with a dense head in the adapter itself, too
    (whole / "config.json").write_text('{"model_type": "pico"}')
    contents = {name: (whole / name).read_bytes() for name in FILES}
    check_loaded(whole, check_folder(whole))
    (room / "heads").mkdir(parents=True)
    refused = loaded = 0
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for case in range(CASES):
        for name, data in contents.items():
            (room / name).write_bytes(data)
        kind = dice.randrange(10)
        if kind < 6:
            name = dice.choice((CONFIG, WEIGHTS, WEIGHTS, *FILES))
            (room / name).write_bytes(dice.choice(BYTES)(contents[name], dice))
        elif kind < 8:
            attack_tensors(room, dice)
        else:
            attack_config(room, dice)
        try:
            adapter = check_folder(room)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, case
        else:
            loaded += 1
            check_loaded(room, adapter)
        assert {p.relative_to(room).as_posix() for p in room.rglob("*")} == {*FILES, "heads"}, case
    assert refused + loaded == CASES and refused > CASES // 2 and loaded > CASES // 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["room", "whole"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < 300 << 10, "kilobytes"
    print(f"{CASES} folders: {refused} refused, {loaded} loaded, {time.monotonic() - began:.0f} s")
