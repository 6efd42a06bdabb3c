"""An attached model under torch.compile: the same numbers, in one graph, following every update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import speft_core as sc
from attached import IDS, LABELS, Net, bits, loss_of, net, oracle_gradients, same_bits, some_mask
from speft_core.ops import native
from speft_core.ops.plans import PLANS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LINEAR = ["left.weight", "right.weight", "out.weight"]


def compiled_loss(model: nn.Module, fullgraph: bool = True, backend: str = "aot_eager") -> object:
    """The loss as one compiled function."""

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(ids).float()
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    torch._dynamo.reset()
    return torch.compile(loss, fullgraph=fullgraph, backend=backend)


@pytest.mark.parametrize("backward", [p for p in (*PLANS, "auto") if p != "native" or not native.reason()])
@pytest.mark.parametrize("names", [LINEAR, None], ids=["linear", "everything"])
def test_one_graph_gives_the_oracles_gradients(backward: str, names: list[str] | None) -> None:
    model = net()
    mask = some_mask(model, names)
    expected = oracle_gradients(model, mask)
    tuner = sc.attach(model, mask, backward=backward)
    loss = compiled_loss(model)(IDS, LABELS)  # type: ignore[operator]
    loss.backward()
    torch.testing.assert_close(loss.detach(), loss_of(model).detach())
    for name, values_K in tuner.values.items():
        assert values_K.grad is not None
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_inductor_trains_as_eager_does_and_detach_is_exact() -> None:
    models = [net(), net()]
    before, mask = bits(models[0]), some_mask(models[0])
    tuners = [sc.attach(m, mask) for m in models]
    compiled = compiled_loss(models[0], backend="inductor")
    optimizers = [torch.optim.AdamW(t.parameters(), lr=1e-2) for t in tuners]
    for _ in range(8):
        pair = [compiled(IDS, LABELS), loss_of(models[1])]  # type: ignore[operator]
        assert pair[0].item() == pytest.approx(pair[1].item(), abs=1e-5)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, values_K in tuners[0].values.items():
        torch.testing.assert_close(values_K, tuners[1].values[name], rtol=1e-4, atol=1e-6)
    tuners[0].detach()
    assert same_bits(bits(models[0]), before)


def test_values_written_behind_torchs_back_reach_a_compiled_forward() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    compiled = compiled_loss(model)
    first = compiled(IDS, LABELS).item()  # type: ignore[operator]
    for values_K in tuner.values.values():
        values_K.data.add_(0.3)
    second = compiled(IDS, LABELS).item()  # type: ignore[operator]
    assert second != first
    assert second == pytest.approx(loss_of(model).item(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_checkpointing_and_autocast_inside_a_graph() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            def block(x: torch.Tensor) -> torch.Tensor:
                return self.norm(torch.nn.functional.silu(self.left(x)) * self.right(x))

            return self.out(checkpoint(block, torch.tanh(self.embed(ids)), use_reentrant=False))

    torch.manual_seed(0)
    model = Checkpointed()
    mask = some_mask(model, LINEAR)
    expected = oracle_gradients(model, mask)
    tuner = sc.attach(model, mask)
    model.embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    compiled_loss(model, fullgraph=False)(IDS, LABELS).backward()  # type: ignore[operator]
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_no_grad_and_changing_batch_sizes() -> None:
    model = net()
    sc.attach(model, some_mask(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 2, 3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS[:rows]), model(IDS[:rows]))
        torch.testing.assert_close(compiled(IDS[:rows]), model(IDS[:rows]))


def test_an_applied_adapter_leaves_nothing_in_the_graph() -> None:
    model = net()
    plain = copy.deepcopy(model)
    adapter = sc.attach(model, some_mask(model)).adapter()
    model._speft_tuner.detach()  # type: ignore[union-attr, operator]
    with adapter.applied(model):
        assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("names", [LINEAR, None], ids=["linear", "everything"])
def test_what_a_graph_traces_gives_the_same_when_it_is_run(
    monkeypatch: pytest.MonkeyPatch, names: list[str] | None, autocast: bool
) -> None:
    model, mask = net(), some_mask(net(), names)
    tuner = sc.attach(model, mask)
    losses, grads = [], []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(loss_of(model))
        losses[-1].backward()
        grads.append({n: v.grad.clone() for n, v in tuner.values.items()})
        for values_K in tuner.values.values():
            values_K.grad = None
    torch.testing.assert_close(losses[0], losses[1])
    for name, grad_K in grads[0].items():
        assert float((grads[1][name] - grad_K).norm()) <= (2e-2 if autocast else 1e-5) * float(grad_K.norm())


@pytest.mark.parametrize("compiling", [False, True])
def test_an_input_given_by_name_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch, compiling: bool) -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    tuner = sc.attach(layer, some_mask(layer, density=0.5))
    grads = []
    for call in (lambda: layer(x), lambda: layer(input=x)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        call().square().sum().backward()
        grads.append({n: v.grad.clone() for n, v in tuner.values.items()})
        for values_K in tuner.values.values():
            values_K.grad = None
    assert grads[0].keys() == {"weight", "bias"} and all(g.any() for g in grads[0].values())
    for name, grad_K in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad_K)
