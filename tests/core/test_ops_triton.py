"""The Triton kernel's numbers, on a CPU through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from speft_core.ops import triton_sddmm, triton_turn
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS
from speft_core.ops.reference import weight_gradient_entries

torch.manual_seed(0)
tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
called = []
entries = triton_sddmm.entries
triton_sddmm.entries = lambda *a: (called.append(1), entries(*a))[1]
for dtype, bound in tolerance.items():
    for tokens, outputs, inputs, k in [(1, 3, 5, 1), (7, 20, 9, 33), (130, 37, 53, 301), (64, 1, 8, 8), (5, 6, 4, 24), (3, 4, 4, 0)]:
        indices_K = torch.randperm(outputs * inputs)[:k].sort().values.to(torch.int32)
        x_TI, grad_TO = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        found_K = PLANS["sampled"].entries(Inputs([(x_TI, dtype)]), grad_TO, Layout.of(indices_K, (outputs, inputs)))
        expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)
        assert found_K.dtype == torch.float32 and found_K.shape == expected_K.shape
        assert (found_K - expected_K).norm() <= bound * expected_K.norm() + 1e-12, (dtype, tokens, outputs, inputs, k)
assert len(called) == 18

for dtype in tolerance:  # an input made of factors, as RMSNorm's: rounded where the model rounds
    tokens, inputs = 70, 45
    hidden, scale, weight = torch.randn(tokens, inputs), torch.rand(tokens, 1), torch.randn(inputs).to(dtype)
    factors = [(hidden, torch.float32), (scale.expand(tokens, inputs), dtype), (weight.expand(tokens, inputs), dtype)]
    cols_C = torch.tensor([0, 3, 4, 17, 44])
    for picks in (None, cols_C):
        expected = weight * (hidden * scale).to(dtype)
        expected = expected if picks is None else expected[:, picks]
        found = triton_turn.turned(factors, picks)
        assert found.shape[1] == 128 and not found[:, tokens:].any()
        if dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds (see test_cuda.py)
            assert (found[:, :tokens].float() - expected.T.float()).abs().le(expected.T.float().abs() / 64 + 1e-30).all()
        else:
            assert torch.equal(found[:, :tokens], expected.T), dtype

x_TI, grad_TO, layout = torch.randn(9, 6), torch.randn(9, 7), Layout.of(torch.arange(0, 42, 5), (7, 6))
factors = [(x_TI.double(), torch.float32), (torch.full((9, 6), 2.0), torch.float32)]  # one that no kernel takes
found_K = PLANS["sampled"].entries(Inputs(factors), grad_TO, layout)
assert (found_K - weight_gradient_entries(2 * x_TI, grad_TO, torch.arange(0, 42, 5))).norm() < 1e-4 and len(called) == 18
print("same")
"""


@pytest.mark.real
def test_the_kernel_gives_the_oracles_entries() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "same"


def test_a_triton_that_cannot_run_is_told_once_and_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from speft_core.ops import triton_turn

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_turn, "installed", lambda: True)
    monkeypatch.setattr(triton_turn, "turned", broken)
    triton_turn.works.cache_clear()
    try:
        assert not triton_turn.usable(torch.zeros(2, 2)) and not triton_turn.usable(torch.ones(3, 3))
    finally:
        triton_turn.works.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().endswith("serve instead: Failed to find C compiler.")
    monkeypatch.setattr(triton_turn, "works", lambda _: True)
    assert triton_turn.usable(torch.zeros(2, 2)) and not triton_turn.usable(torch.zeros(2, 2), torch.zeros(2, 2).double())


def test_triton_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from speft_core.ops import triton_turn

    monkeypatch.setattr(triton_turn.importlib.util, "find_spec", lambda _: object())
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("SPEFT_TRITON", value)
        triton_turn.installed.cache_clear()
        assert triton_turn.installed() is expected
    triton_turn.installed.cache_clear()


def test_without_cuda_and_interpreter_the_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from speft_core.ops import triton_turn

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_turn.usable(torch.zeros(2, 2))
