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


def groups_of(
    sizes: list[int], limit: int | None, host: int, device: str = "cuda:0", free: int | None = None
) -> list[dict[str, str]]:
    """plan_groups for fp32 tensors of `sizes` elements on a device that this machine need not have; `host` and `free` bytes are
    free on the host and there."""
    parameters = {
        str(n): SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=torch.Size([s])) for n, s in enumerate(sizes)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "base_parameters", lambda _: parameters)
        patch.setattr(memory, "free_host_memory", lambda: host)
        patch.setattr(memory, "free_device_memory", lambda devices: free if {d.type for d in devices} == {"cuda"} else None)
        return memory.plan_groups(None, list(parameters), limit)  # type: ignore[arg-type]


def cost(group: dict[str, str], sizes: list[int], device: str) -> int:
    return sum(4 * sizes[int(name)] for name, where in group.items() if where == device)


SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 800), st.integers(0, 1600))
def test_no_group_takes_more_than_device_and_half_the_free_host_memory(sizes: list[int], limit: int, host: int) -> None:
    groups = groups_of(sizes, limit, host)
    assert [name for group in groups for name in group] == [str(n) for n in range(len(sizes))]
    for group in groups:
        assert set(group.values()) <= {"cuda:0", "cpu"}
        alone = list(group.values()).count("cuda:0") == 1 and cost(group, sizes, "cuda:0") > host // 2  # what fits nowhere
        assert alone or cost(group, sizes, "cuda:0") <= limit
        assert cost(group, sizes, "cpu") <= host // 2


@given(SIZES, st.integers(1, 800), st.integers(0, 1600))
def test_a_new_pass_begins_only_when_the_next_target_fits_nowhere(sizes: list[int], limit: int, host: int) -> None:
    groups = groups_of(sizes, limit, host)
    for group, following in zip(groups[:-1], groups[1:], strict=True):
        needed = 4 * sizes[int(next(iter(following)))]
        assert needed > limit - cost(group, sizes, "cuda:0") and needed > host // 2 - cost(group, sizes, "cpu")
    for group in groups:
        for place, (name, where) in enumerate(group.items()):
            before = dict(list(group.items())[:place])
            if where == "cpu":  # the host is used only where the device has no room
                assert 4 * sizes[int(name)] > limit - cost(before, sizes, "cuda:0")


@given(SIZES, st.integers(1, 800))
def test_on_a_cpu_host_memory_is_no_second_place(sizes: list[int], limit: int) -> None:
    for device in ("cpu", "meta"):
        for group in groups_of(sizes, limit, 10**9, device):
            assert set(group.values()) == {device}
            assert len(group) == 1 or cost(group, sizes, device) <= limit


@given(SIZES, st.integers(2, 1600), st.integers(0, 1600))
def test_without_a_limit_half_of_what_is_free_on_the_device_is_taken(sizes: list[int], free: int, host: int) -> None:
    assert groups_of(sizes, None, host, free=free) == groups_of(sizes, free // 2, host)
    assert groups_of(sizes, None, host, "cpu", free) == [{str(n): "cpu" for n in range(len(sizes))}]


def test_free_device_memory_counts_what_pytorch_holds_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    free, reserved, allocated = {first: 100, second: 90}, {first: 50, second: 70}, {first: 20, second: 10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    assert memory.free_device_memory([torch.device("cpu"), first]) == 130
    assert memory.free_device_memory([first, second, first]) == 130
    assert memory.free_device_memory([second]) == 150
    assert memory.free_device_memory([torch.device("cpu"), torch.device("meta")]) is None


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
