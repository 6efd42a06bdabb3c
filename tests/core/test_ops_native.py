"""The compiled plan: the same as the others for any number of threads, optional, and writing the very bits that PyTorch writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speft_core as sc
from attached import loss_of, net, oracle_gradients, some_mask
from speft_core.ops import native
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS
from speft_core.ops.reference import weight_gradient_entries

needs_compiler = pytest.mark.skipif(bool(native.reason()), reason=f"the compiled plan is not there: {native.reason()}")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 127, 128, 129, 300, 1025])
def test_any_number_of_threads_and_tokens(tokens: int, threads: int, dtype: torch.dtype) -> None:
    x_TI, grad_TO = torch.randn(tokens, 45).to(dtype), torch.randn(tokens, 67).to(dtype)
    indices_K = torch.randperm(67 * 45)[:500].sort().values.to(torch.int32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        layout = Layout.of(indices_K, (67, 45))
        found_K = [PLANS["native"].entries(Inputs([(x_TI, dtype)]), grad_TO, layout) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)
    assert torch.equal(*found_K)
    assert (found_K[0] - expected_K).norm() <= 1e-5 * expected_K.norm()


@needs_compiler
def test_products_of_factors_are_rounded_where_they_were() -> None:
    hidden_TI, rsqrt_T1, weight_I = torch.randn(150, 30), torch.rand(150, 1), torch.randn(30).bfloat16()
    x_TI = weight_I * (hidden_TI * rsqrt_T1).bfloat16()
    grad_TO, indices_K = torch.randn(150, 20).bfloat16(), torch.randperm(600)[:80].sort().values.to(torch.int32)
    factors = [
        (hidden_TI, torch.float32),
        (rsqrt_T1.expand(150, 30), torch.bfloat16),
        (weight_I.expand(150, 30), torch.bfloat16),
    ]
    layout = Layout.of(indices_K, (20, 30))
    from_factors = PLANS["native"].entries(Inputs(factors), grad_TO, layout)
    assert torch.equal(from_factors, PLANS["native"].entries(Inputs([(x_TI, torch.bfloat16)]), grad_TO, layout))


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


WHY = "from speft_core.ops import native; print(native.reason())"


def test_it_can_be_turned_off_and_does_without_a_compiler(tmp_path: Path) -> None:
    assert run(WHY, SPEFT_NATIVE="0") == "SPEFT_NATIVE=0"
    assert run(WHY, PATH="", CC="", SPEFT_NATIVE="1") == "no C compiler"
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert run(WHY, CC=str(broken), SPEFT_NATIVE="1") == f"{broken} cannot build it (CalledProcessError)"


@needs_compiler
def test_it_is_built_once_and_without_a_writable_cache(tmp_path: Path) -> None:
    assert run(WHY, SPEFT_CACHE=str(tmp_path / "cache")) == ""
    (library,) = (tmp_path / "cache").iterdir()
    stamp = library.stat().st_mtime_ns
    assert run(WHY, SPEFT_CACHE=str(tmp_path / "cache")) == ""
    assert library.stat().st_mtime_ns == stamp
    (tmp_path / "file").write_text("")
    assert run(WHY, SPEFT_CACHE=str(tmp_path / "file" / "below"), TMPDIR=str(tmp_path)) == ""


def test_without_it_the_other_plans_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "off for this test"))
    model, mask = net(), some_mask(net())
    expected = oracle_gradients(model, mask)
    with pytest.raises(sc.UserError, match="backward native cannot run here: off for this test; use auto"):
        sc.attach(model, mask, backward="native")
    tuner = sc.attach(model, mask)
    assert {row.plan for row in tuner.plan().values()} <= {"compact", "sampled", "dense", "tap"}
    loss_of(model).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)


@needs_compiler
def test_weights_it_does_not_take_are_refused_by_name() -> None:
    with pytest.raises(sc.UserError, match="it takes fp32 and bf16 weights on a CPU, not torch.float64 on cpu"):
        sc.attach(net(torch.float64), some_mask(net()), backward="native")
