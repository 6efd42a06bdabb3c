"""What the other tests state on a CPU, on a GPU: `SPEFT_TEST_CUDA=0 pytest tests/core/test_cuda.py`. Skipped where there is none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pico
import speft_core as sc
from attached import bits, same_bits
from speft_core.ops import triton_turn
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.plans import PLANS
from speft_core.ops.reference import weight_gradient_entries

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and SPEFT_TEST_CUDA with its number")
GPU_PLANS = [name for name in PLANS if name != "native"]
SHAPES = [(1, 3, 5, 1), (7, 20, 9, 33), (130, 37, 53, 301), (64, 1, 8, 8), (2500, 96, 160, 700), (3, 4, 4, 0)]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises at whatever makes the host wait for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.cuda() for key, value in pico.batch(model, rows=3, length=9).items()}


def gradient_mask(model: torch.nn.Module, **settings: object) -> sc.SparsityMask:
    return sc.find_mask(model, [batch(model)], "gradient", sc.Budget(k=200), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("plan", GPU_PLANS)
def test_every_plan_gives_the_oracles_entries(plan: str, dtype: torch.dtype) -> None:
    for tokens, outputs, inputs, k in SHAPES:
        indices_K = torch.randperm(outputs * inputs)[:k].sort().values.to(torch.int32)
        x_TI, grad_TO = (torch.randn(tokens, n, device="cuda").to(dtype) for n in (inputs, outputs))
        layout = Layout.of(indices_K.cuda(), (outputs, inputs))
        found_K = PLANS[plan].entries(Inputs([(x_TI, dtype)]), grad_TO, layout)
        expected_K = weight_gradient_entries(x_TI.double(), grad_TO.double(), indices_K.cuda())
        assert found_K.shape == expected_K.shape
        assert (found_K - expected_K).norm() <= BOUNDS[dtype] * expected_K.norm() + 1e-12, (tokens, outputs, inputs, k)


@pytest.mark.skipif(not triton_turn.installed(), reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_turned_factors_have_the_bits_of_the_models_own_product(dtype: torch.dtype) -> None:
    tokens, inputs = 300, 200
    hidden, scale = torch.randn(tokens, inputs, device="cuda"), torch.rand(tokens, 1, device="cuda")
    weight = torch.randn(inputs, device="cuda").to(dtype)
    factors = [(hidden, torch.float32), (scale.expand(tokens, inputs), dtype), (weight.expand(tokens, inputs), dtype)]
    for picks in (None, torch.arange(0, inputs, 3, device="cuda", dtype=torch.int32)):
        expected = weight * (hidden * scale).to(dtype)
        found = triton_turn.turned(factors, picks)
        assert torch.equal(found[:, :tokens], (expected if picks is None else expected[:, picks.long()]).T)
        assert not found[:, tokens:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [*GPU_PLANS, "auto"])
def test_training_never_waits_and_detach_gives_back_every_bit(backward: str, dtype: torch.dtype) -> None:
    model = pico.llama(dtype=dtype).cuda()
    before, given = bits(model), batch(model)
    tuner = sc.attach(model, gradient_mask(model), backward=backward)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for step in range(6):
        if step < 2:  # the first steps find out what layers share
            model(**given).loss.backward()
        else:
            with no_waiting():
                model(input_ids=given["input_ids"]).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not same_bits(bits(model), before)
    tuner.detach()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("backward", [*GPU_PLANS, "auto"])
def test_gradients_equal_those_of_the_cpu(backward: str) -> None:
    on_cpu = pico.llama()
    model = copy.deepcopy(on_cpu).cuda()
    given = pico.batch(on_cpu, rows=3, length=9)
    mask = sc.find_mask(on_cpu, [given], "gradient", sc.Budget(k=200))
    tuners = [sc.attach(on_cpu, mask), sc.attach(model, mask, backward=backward)]
    on_cpu(**given).loss.backward()
    model(**batch(model)).loss.backward()
    for name, values_K in tuners[0].values.items():
        assert values_K.grad is not None and tuners[1].values[name].grad is not None
        torch.testing.assert_close(tuners[1].values[name].grad.cpu(), values_K.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", ["gradient", "snip", "fisher"])
def test_memory_limits_change_no_mask_on_a_gpu(metric: str) -> None:
    model = pico.llama().cuda()
    given = [batch(model), batch(model)]
    free = sc.find_mask(model, given, metric, sc.Budget(k=150))
    limited = sc.find_mask(model, given, metric, sc.Budget(k=150), memory_limit=5000)
    assert free.nnz == 150 and limited == free


def test_an_adapter_goes_on_and_off_a_gpu_and_moves_between_devices() -> None:
    model = pico.llama(dtype=torch.bfloat16).cuda()
    before, given = bits(model), batch(model)
    tuner = sc.attach(model, gradient_mask(model))
    with torch.no_grad():
        for values_K in tuner.values.values():
            values_K.add_(torch.randn_like(values_K), alpha=0.1)
    adapter = tuner.adapter()
    expected = model(**given).logits
    tuner.detach()
    for _ in range(50):
        handle = adapter.apply(model)
        handle.restore()
    assert same_bits(bits(model), before)
    handle = adapter.apply(model)
    assert torch.equal(model(**given).logits, expected)
    model.cpu()
    handle.restore()
    assert same_bits(bits(model), {name: tensor.cpu() for name, tensor in before.items()})


def test_a_tuner_and_a_bank_follow_their_model_to_a_gpu_and_back() -> None:
    model = pico.llama()
    before, given = bits(model), pico.batch(model)
    masks = [sc.find_mask(model, [given], "random", sc.Budget(k=90), seed=seed) for seed in range(2)]
    names = [n for n in masks[0].names if all(m.indices[n].numel() for m in masks)]
    masks = [sc.SparsityMask({n: m.indices[n] for n in names}, {n: m.shapes[n] for n in names}) for m in masks]
    tuner = sc.attach(model, masks[0])
    for number, device in enumerate(("cpu", "cuda", "cpu", "cuda")):
        model.to(device)
        with torch.no_grad():
            for values_K in tuner.values.values():
                values_K.add_(torch.randn_like(values_K), alpha=0.1)
        adapter = tuner.adapter()
        tuner.remask(masks[(number + 1) % 2])
    assert tuner.parked
    tuner.detach()
    assert same_bits(bits(model.cpu()), before)
    bank = sc.AdapterBank(model, {"a": adapter})
    bank.switch("a")
    adapted = bits(model)
    for device in ("cuda", "cpu"):
        model.to(device)
        bank.switch(None)
        assert same_bits({n: t.cpu() for n, t in bits(model).items()}, before)
        bank.switch("a")
        assert same_bits({n: t.cpu() for n, t in bits(model).items()}, adapted)
    bank.close()
    assert same_bits(bits(model), before)


def test_a_bank_answers_each_row_by_its_adapter_on_a_gpu() -> None:
    model = pico.llama().cuda()
    before, given = bits(model), batch(model)
    adapters = {}
    for number, name in enumerate(("first", "second")):
        tuner = sc.attach(model, sc.find_mask(model, [given], "random", sc.Budget(k=90), seed=number))
        with torch.no_grad():
            for values_K in tuner.values.values():
                values_K.add_(torch.randn_like(values_K), alpha=0.1)
        adapters[name] = tuner.adapter()
        tuner.detach()
    alone = []
    for adapter in adapters.values():
        handle = adapter.apply(model)
        with torch.no_grad():
            alone.append(model(**given).logits)
        handle.restore()
    bank = sc.AdapterBank(model, adapters)
    for name, expected in zip(adapters, alone, strict=True):
        with bank.using(name), torch.no_grad():
            assert torch.equal(model(**given).logits, expected)
    bank.close()
    assert same_bits(bits(model), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_trains_as_eager_does_on_a_gpu(dtype: torch.dtype) -> None:
    models = [pico.llama(dtype=dtype).cuda() for _ in range(2)]
    before, given = bits(models[0]), batch(models[0])
    mask = gradient_mask(models[0])
    tuners = [sc.attach(model, mask) for model in models]
    torch._dynamo.reset()
    forward = torch.compile(lambda ids: models[0](input_ids=ids, labels=ids, use_cache=False).loss)
    optimizers = [torch.optim.AdamW(tuner.parameters(), lr=1e-2) for tuner in tuners]
    ids = given["input_ids"]
    for _ in range(5):
        pair = [forward(ids), models[1](input_ids=ids, labels=ids, use_cache=False).loss]
        assert pair[0].item() == pytest.approx(pair[1].item(), rel=1e-4 if dtype == torch.float32 else 3e-2)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for tuner, model in zip(tuners, models, strict=True):
        tuner.detach()
        assert same_bits(bits(model), before)


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = pico.llama().cuda().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        tuner = sc.attach(model, gradient_mask(model))
        model(**batch(model)).loss.backward()
        grads.append([v.grad.clone() for v in tuner.values.values() if v.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)
