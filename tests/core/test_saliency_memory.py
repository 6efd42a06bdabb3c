"""Where accumulators go: limits hold on the device and on the host, in the fewest passes that model order allows."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core.saliency import memory


def groups_of(sizes: list[int], limit: int | None, host: int, devices: str | list[str] = "cuda:0") -> list[dict[str, str]]:
    """plan_groups for fp32 tensors of `sizes` elements on devices that this machine need not have; `host` bytes are free."""
    where = [devices] * len(sizes) if isinstance(devices, str) else devices
    parameters = {
        str(n): SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=torch.Size([size]))
        for n, (size, device) in enumerate(zip(sizes, where, strict=True))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "base_parameters", lambda _: parameters)
        patch.setattr(memory, "free_host_memory", lambda: host)
        return memory.plan_groups(None, list(parameters), limit)  # type: ignore[arg-type]


def cost(group: dict[str, str], sizes: list[int], device: str) -> int:
    return sum(4 * sizes[int(name)] for name, where in group.items() if where == device)


SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 800), st.integers(0, 1600))
def test_no_group_takes_more_than_device_and_half_the_free_host_memory(sizes: list[int], limit: int, host: int) -> None:
    groups = groups_of(sizes, limit, host)
    assert [name for group in groups for name in group] == [str(n) for n in range(len(sizes))]
    for group in groups:
        assert set(group.values()) <= {"own", "cpu"}
        alone = list(group.values()).count("own") == 1 and cost(group, sizes, "own") > host // 2  # what fits nowhere
        assert alone or cost(group, sizes, "own") <= limit
        assert cost(group, sizes, "cpu") <= host // 2


@given(SIZES, st.integers(1, 800), st.integers(0, 1600))
def test_a_new_pass_begins_only_when_the_next_target_fits_nowhere(sizes: list[int], limit: int, host: int) -> None:
    groups = groups_of(sizes, limit, host)
    for group, following in zip(groups[:-1], groups[1:], strict=True):
        needed = 4 * sizes[int(next(iter(following)))]
        assert needed > limit - cost(group, sizes, "own") and needed > host // 2 - cost(group, sizes, "cpu")
    for group in groups:
        for place, (name, where) in enumerate(group.items()):
            before = dict(list(group.items())[:place])
            if where == "cpu":  # the host is used only where the device has no room
                assert 4 * sizes[int(name)] > limit - cost(before, sizes, "own")


@given(SIZES, st.integers(1, 800))
def test_on_a_cpu_host_memory_is_no_second_place(sizes: list[int], limit: int) -> None:
    for device in ("cpu", "meta"):
        for group in groups_of(sizes, limit, 10**9, device):
            assert set(group.values()) == {"own"}
            assert len(group) == 1 or cost(group, sizes, "own") <= limit


def test_each_device_has_the_limit_for_itself() -> None:
    devices = ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert groups_of([100] * 4, 800, 0, devices) == [dict.fromkeys("0123", "own")]
    assert groups_of([100] * 4, 400, 0, devices) == [{"0": "own"}, {"1": "own", "2": "own"}, {"3": "own"}]
    assert groups_of([100] * 4, 400, 1600, devices) == [{"0": "own", "1": "cpu", "2": "own", "3": "cpu"}]
    assert groups_of([100] * 4, None, 0, devices) == [dict.fromkeys("0123", "own")]


def test_without_a_limit_half_of_what_is_free_on_the_fullest_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    free, reserved, allocated = {first: 100, second: 90}, {first: 50, second: 70}, {first: 20, second: 10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)  # what PyTorch holds and does not use is free too
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    devices = {"a": first, "b": second, "c": torch.device("cpu"), "d": torch.device("meta")}
    monkeypatch.setattr(memory, "base_parameters", lambda _: {n: SimpleNamespace(device=d) for n, d in devices.items()})
    for names, expected in (("a", 65), ("b", 75), ("abc", 65), ("bd", 75), ("cd", None)):
        assert memory.default_limit(None, list(names)) == expected  # type: ignore[arg-type]


MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    3000 kB\n"


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def given_text(text: str) -> None:
        monkeypatch.setattr("builtins.open", lambda *args: (asked.append(args), io.StringIO(text))[1])

    given_text(MEMINFO)
    assert memory.free_host_memory() == 3000 * 1024
    given_text(MEMINFO.replace("MemAvailable", "Cached"))  # a kernel that does not say
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.free_host_memory() == 7 * 4096
    monkeypatch.delattr(os, "sysconf")
    given_text("")
    assert memory.free_host_memory() == 0
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert memory.free_host_memory() == 0
    assert set(asked) == {("/proc/meminfo",)}
