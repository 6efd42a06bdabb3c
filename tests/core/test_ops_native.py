"""The compiled plan: the same as the others for any number of threads, optional, and writing the very bits that PyTorch writes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

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


def whole_numbers(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, width] of whole numbers so small that every sum of products is exact."""
    return torch.randint(-4, 5, (tokens, width)).to(dtype)


PLACES: dict[str, Callable[[int], torch.Tensor]] = {
    "the first": lambda n: torch.arange(1),
    "the last": lambda n: torch.arange(n - 1, n),
    "far apart": lambda n: torch.arange(0, n, 9),
    "neighbours": lambda n: torch.arange(n)[torch.arange(n) // 5 % 2 == 1] if n > 5 else torch.arange(n),
    "all": torch.arange,
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("outputs", [3, 8, 1100])
@pytest.mark.parametrize("columns", PLACES)
@pytest.mark.parametrize("rows", PLACES)
def test_rows_and_columns_wherever_they_lie(rows: str, columns: str, outputs: int, width: int, dtype: torch.dtype) -> None:
    x_TI, grad_TO = whole_numbers(67, width, dtype), whole_numbers(67, outputs, dtype)
    indices_K = (PLACES[rows](outputs)[:, None] * width + PLACES[columns](width)).flatten().to(torch.int32)
    found_K = PLANS["native"].entries(Inputs([(x_TI, dtype)]), grad_TO, Layout.of(indices_K, (outputs, width)))
    assert torch.equal(found_K.double(), weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K))


FACTORS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "row by row": lambda d: whole_numbers(67, 31, d),
    "column by column": lambda d: whole_numbers(31, 67, d).t(),
    "with gaps": lambda d: whole_numbers(67, 62, d)[:, ::2],
    "one a token": lambda d: whole_numbers(67, 1, d).expand(67, 31),
    "one a token, with gaps": lambda d: whole_numbers(67, 3, d)[:, :1].expand(67, 31),
    "one a column": lambda d: whole_numbers(1, 31, d).expand(67, 31),
    "one a column, with gaps": lambda d: whole_numbers(1, 62, d)[:, ::2].expand(67, 31),
}


@needs_compiler
@pytest.mark.parametrize("dtypes", [(a, b) for a in native.DTYPES for b in native.DTYPES], ids=str)
@pytest.mark.parametrize("second", FACTORS)
@pytest.mark.parametrize("first", FACTORS)
def test_factors_however_they_lie(first: str, second: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    factors = [FACTORS[name](dtype) for name, dtype in zip((first, second), dtypes, strict=True)]
    grad_TO, indices_K = whole_numbers(67, 20, dtypes[1]), torch.randperm(620)[:150].sort().values.to(torch.int32)
    found_K = PLANS["native"].entries(Inputs([(f, torch.float32) for f in factors]), grad_TO, Layout.of(indices_K, (20, 31)))
    x_TI = factors[0].double() * factors[1].double()
    assert torch.equal(found_K.double(), weight_gradient_entries(x_TI, grad_TO.double(), indices_K))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("every", [1, 9])
def test_the_scratch_stays_within_the_bytes_asked_for(every: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    room: list[torch.Tensor] = []

    def scratch(size: int) -> torch.Tensor:
        room.append(torch.full((size + 64,), 7, dtype=torch.uint8))
        return room[0]

    monkeypatch.setattr(native, "_scratch", scratch)
    indices_K = (torch.arange(0, 1100, every)[:, None] * 90 + torch.arange(0, 90, every)).flatten().to(torch.int32)
    layout, x_TI, grad_TO = Layout.of(indices_K, (1100, 90)), torch.randn(300, 90).to(dtype), torch.randn(300, 1100).to(dtype)
    PLANS["native"].entries(Inputs([(x_TI, dtype)]), grad_TO, layout)
    assert bool((room[0][-64:] == 7).all()) and not bool((room[0][:-64] == 7).all())


@needs_compiler
@pytest.mark.parametrize("width", [5, 45])
@pytest.mark.parametrize("tokens", [1, 31, 33, 130])
def test_bf16_products_of_wider_factors_at_any_number_of_tokens(tokens: int, width: int) -> None:
    hidden_TI, scale_T1, weight_I = torch.randn(tokens, width), torch.rand(tokens, 1), torch.randn(width).bfloat16()
    grad_TO = torch.randn(tokens, 67).bfloat16()
    factors = [(hidden_TI, torch.float32), (scale_T1, torch.bfloat16), (weight_I, torch.bfloat16)]
    indices_K = torch.randperm(67 * width)[:200].sort().values.to(torch.int32)
    inputs = Inputs([(factor.expand(tokens, width), dtype) for factor, dtype in factors])
    found_K = PLANS["native"].entries(inputs, grad_TO, Layout.of(indices_K, (67, width)))
    x_TI = (hidden_TI * scale_T1).bfloat16() * weight_I
    expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K)
    assert (found_K - expected_K).norm() <= 1e-5 * expected_K.norm()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_code_is_what_answers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(native, "sampled_entries", lambda *_: pytest.fail("the compiled code takes these"))
    x_TI, grad_TO = torch.randn(20, 9).to(dtype), torch.randn(20, 7).to(dtype)
    indices_K = torch.arange(0, 63, 4, dtype=torch.int32)
    layout = Layout.of(indices_K[indices_K % 9 > 2], (7, 9))  # not all columns, so that the kept ones lie elsewhere
    expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K[indices_K % 9 > 2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.set_default_dtype(torch.float64)
    try:
        kept_TC = x_TI[:, layout.cols_C.long()]
        for inputs in (Inputs([(x_TI, dtype)]), Inputs([(kept_TC, dtype)], layout.cols_C, "own"), Inputs([(x_TI, dtype)])):
            found_K = native.native_entries(inputs, grad_TO, layout)
            assert found_K.dtype == torch.float32
            assert (found_K - expected_K).norm() <= 1e-5 * expected_K.norm()
    finally:
        torch.set_default_dtype(torch.float32)


class _Watched:
    """The library, and into how many parts each call was split."""

    def __init__(self) -> None:
        self.library, self.parts = native._load()[0], []
        assert self.library is not None
        self.speft_scratch = self.library.speft_scratch

    def speft_entries(self, *given: Any) -> None:
        self.parts.append(given[5])
        assert self.library is not None
        self.library.speft_entries(*given)


@needs_compiler
def test_each_thread_has_a_block_of_tokens_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, layout = _Watched(), Layout.of(torch.arange(5), (3, 4))
    monkeypatch.setattr(native, "_load", lambda: (watched, ""))
    for threads, tokens in ((1, 1000), (3, 1), (3, 64), (3, 65), (3, 128), (3, 129), (3, 1000), (3, 0)):
        monkeypatch.setattr(native, "_threads", lambda threads=threads: threads)
        native.native_entries(Inputs([(torch.ones(tokens, 4), torch.float32)]), torch.ones(tokens, 3), layout)
    assert watched.parts == [1, 1, 1, 2, 2, 3, 3, 1]


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


RULES: dict[str, Callable[[list[Any]], None]] = {
    "int64 indices": lambda c: c.__setitem__(1, c[1].long()),
    "base in another dtype": lambda c: c.__setitem__(2, c[2].bfloat16()),
    "a weight in fp64": lambda c: (c.__setitem__(0, c[0].double()), c.__setitem__(2, c[2].double())),
    "a weight with gaps": lambda c: c.__setitem__(0, torch.zeros(4, 16)[:, ::2]),
    "values in fp16": lambda c: c.__setitem__(3, c[3].half()),
    "too few indices": lambda c: c.__setitem__(1, c[1][:1]),
    "too few base entries": lambda c: c.__setitem__(2, c[2][:1]),
    "too few values": lambda c: c.__setitem__(3, c[3][:1]),
    "indices with gaps": lambda c: c.__setitem__(1, torch.arange(6, dtype=torch.int32)[::2]),
    "base with gaps": lambda c: c.__setitem__(2, torch.zeros(6)[::2]),
    "values with gaps": lambda c: c.__setitem__(3, torch.zeros(6)[::2]),
    "indices elsewhere": lambda c: c.__setitem__(1, c[1].to("meta")),
    "base elsewhere": lambda c: c.__setitem__(2, c[2].to("meta")),
    "values elsewhere": lambda c: c.__setitem__(3, c[3].to("meta")),
    "a weight elsewhere": lambda c: c.__setitem__(0, c[0].to("meta")),
}


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
def test_the_compiled_writes_take_nothing_else(rule: str) -> None:
    change: list[Any] = [torch.zeros(4, 8), torch.arange(3, dtype=torch.int32), torch.zeros(3), torch.zeros(3)]
    assert native.writes((*change,)) and native.writes((*change[:3], None))
    assert native.writes((change[0].bfloat16(), change[1], change[2].bfloat16(), change[3]))
    RULES[rule](change)
    assert not native.writes((*change,))


@needs_compiler
def test_weights_fit_by_device_dtype_and_size() -> None:
    one = torch.zeros(1)
    assert native.fits(one) and native.fits(one.bfloat16())
    assert native.fits(one.expand(2**31 - 1)) and not native.fits(one.expand(2**31))
    assert not native.fits(one.double()) and not native.fits(one.half()) and not native.fits(one.to("meta"))


def test_the_scratch_buffer_of_a_thread_grows_and_is_its_own() -> None:
    small = native._scratch(10)
    assert small.numel() >= 10 and native._scratch(small.numel()) is small and native._scratch(1) is small
    large = native._scratch(small.numel() + 1)
    assert large.numel() == small.numel() + 1 and large is not small and native._scratch(10) is large
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.append(native._scratch(10)))
    thread.start()
    thread.join()
    assert others[0] is not large and others[0].numel() == 10 and others[0].dtype == torch.uint8
    assert native._scratch(10) is large


@needs_compiler
@pytest.mark.parametrize("what", ["take", "put", "add"])
def test_indices_outside_are_counted_and_left_out(what: str) -> None:
    weight, base_K, values_K = torch.zeros(2, 3), torch.full((4,), 2.0), torch.ones(4)
    changes = native.Changes([(weight, torch.tensor([-1, 0, 5, 6], dtype=torch.int32), base_K, values_K)])
    with pytest.raises(IndexError, match="2 indices lie outside their weights"):
        changes.run(what)
    written = {"take": 0.0, "put": 2.0, "add": 3.0}[what]
    assert weight.flatten().tolist() == [written, 0, 0, 0, 0, written]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["input", "gradient"])
def test_numbers_it_does_not_read_go_to_the_sampled_plan(monkeypatch: pytest.MonkeyPatch, which: str, dtype: torch.dtype) -> None:
    asked: list[int] = []
    monkeypatch.setattr(native, "sampled_entries", lambda *_: asked.append(1))
    x_TI, grad_TO = (torch.randn(5, 4).to(dtype if name == which else torch.float32) for name in ("input", "gradient"))
    native.native_entries(Inputs([(x_TI, torch.float32)]), grad_TO, Layout.of(torch.tensor([1, 6]), (4, 4)))
    assert asked == [1]


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
