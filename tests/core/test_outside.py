"""Parameters that a module above reads without calling their own: they train as in the dense model, and the others cost nothing more."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import speft_core as sc
from attached import IDS, bits, loss_of, net, oracle_gradients, same_bits, some_mask, train


class Block(nn.Module):
    """Reads `inner.read.weight` without calling it, calls and reads `both`, and calls `called`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"read": nn.Linear(12, 12)})
        self.both, self.called = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(functional.linear(x, self.inner["read"].weight, self.inner["read"].bias))
        return x + self.called(torch.tanh(self.both(x) @ self.both.weight))


class Reader(nn.Module):
    """Two blocks, perhaps computed again in backward, and logits from the embeddings' weight, which no head is tied to."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.run = nn.Embedding(31, 12), nn.ModuleList([Block(), Block()]), run

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.run(block, x)
        return functional.linear(x, self.embed.weight)


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "plainly": lambda block, x: block(x),
    "again, non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),  # type: ignore[dict-item]
    "again, reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),  # type: ignore[dict-item]
}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def check(
    tuner: sc.Tuner, model: nn.Module, expected: dict[str, torch.Tensor], loss: Callable[[nn.Module], torch.Tensor] = loss_of
) -> None:
    for values_K in tuner.parameters():
        values_K.grad = None
    loss(model).backward()
    assert set(tuner.values) == set(expected)
    for name, values_K in tuner.values.items():
        assert expected[name].any() or "D" in name, name
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_dense_model_from_the_first_step_on(way: str) -> None:
    model = Reader(WAYS[way])
    mask, before = some_mask(model), bits(model)
    tuner = sc.attach(model, mask)
    for _ in range(3):  # before it is known who reads what, and after
        check(tuner, model, oracle_gradients(_plain(model, tuner), mask))
        train(tuner, model, 1)
    model.run = WAYS["plainly"]
    with torch.no_grad():
        assert torch.equal(model(IDS), _plain(model, tuner)(IDS))
    tuner.detach()
    assert same_bits(bits(model), before) and not hooks_of(model)


def _plain(model: nn.Module, tuner: sc.Tuner) -> nn.Module:
    """A model that is not attached, with the weights that training has reached."""
    other = Reader(WAYS["plainly"])
    tuner.sync()
    other.load_state_dict(model.state_dict())
    return other


def test_two_forwards_before_one_backward_and_several_backwards() -> None:
    model = Reader(WAYS["plainly"])
    mask = some_mask(model)
    expected = oracle_gradients(model, mask, lambda m: 2 * loss_of(m))
    tuner = sc.attach(model, mask)
    for _ in range(2):
        check(tuner, model, expected, lambda m: loss_of(m) + loss_of(m))
    for values_K in tuner.parameters():
        values_K.grad = None
    for _ in range(2):
        loss_of(model).backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_a_model_whose_modules_are_all_called_is_left_without_hooks() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    assert hooks_of(model)
    loss_of(model)
    loss_of(model).backward()  # known now
    assert hooks_of(model)
    loss_of(model).backward()
    assert not hooks_of(model)
    tuner.detach()


def test_a_forward_that_fails_leaves_every_parameter_in_its_place() -> None:
    model = Reader(WAYS["plainly"])
    sc.attach(model, some_mask(model))
    with pytest.raises(IndexError):
        model(torch.tensor([[10_000]]))
    assert all(isinstance(m.weight, nn.Parameter) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))


class Interrupt(BaseException):
    pass


def test_an_interrupted_forward_leaves_nothing_that_lasts() -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupt

    model, plain = Reader(WAYS["plainly"]), Reader(WAYS["plainly"])
    before, mask = bits(model), some_mask(model)
    tuner = sc.attach(model, mask)
    for _ in range(2):
        hook = model.blocks[1].called.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
        with pytest.raises(Interrupt):
            model(IDS)
        hook.remove()
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        check(tuner, model, oracle_gradients(plain, mask))
        train(tuner, model, 1)
    model.blocks[1].called.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(Interrupt):
        model(IDS)
    tuner.detach()
    assert same_bits(bits(model), before) and all(isinstance(m.weight, nn.Parameter) for m in model.modules() if isinstance(m, nn.Linear))


def test_a_module_that_is_never_used_is_given_up() -> None:
    model = net()
    model.idle = nn.Linear(12, 12)
    tuner = sc.attach(model, some_mask(model))
    train(tuner, model, 2)
    assert hooks_of(model)
    train(tuner, model, 8)
    assert not hooks_of(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, of the layers' inputs
def test_layers_compiled_one_by_one_count_as_called() -> None:
    model = net()
    tuner = sc.attach(model, some_mask(model))
    for module in (model.embed, model.left, model.right, model.norm, model.out):
        module.compile(backend="aot_eager")
    train(tuner, model, 2)
    assert not hooks_of(model)


def test_a_deep_copy_goes_its_own_way() -> None:
    model = Reader(WAYS["plainly"])
    tuner = sc.attach(model, some_mask(model))
    train(tuner, model, 2)
    twin = copy.deepcopy(model)
    theirs: Any = twin._speft_tuner
    assert train(tuner, model, 3) == train(theirs, twin, 3)
    before = bits(model)
    train(theirs, twin, 2)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_attention_of_torch_trains_and_its_fast_path_sees_the_last_step(kind: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)
            self.layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True)
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            return self.head(self.layer(x) if kind == "layer" else self.attention(x, x, x)[0])

    model = Encoder()
    names = [n for n, _ in model.named_parameters() if n.startswith(("embed", "head", kind)) and n != "attention.in_proj_bias"]
    mask = some_mask(model, names)
    tuner = sc.attach(model, mask)
    for _ in range(3):
        plain = Encoder()
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        check(tuner, model, oracle_gradients(plain, mask))
        train(tuner, model, 1)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model.eval()(IDS), plain.eval()(IDS))


@pytest.mark.parametrize("recomputed", [False, True])
def test_mambas_mixer_reads_dt_proj_and_the_convolution(recomputed: bool) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 31, "hidden_size": 12, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(**settings))
    if recomputed:
        model.activation_checkpointing_enable()

    def loss(m: nn.Module) -> torch.Tensor:
        return m.train()(input_ids=IDS, labels=IDS).loss  # type: ignore[no-any-return]

    mask = some_mask(model, [n for n, _ in model.named_parameters() if "mixer" in n], density=0.2)
    assert any("dt_proj.weight" in n for n in mask.names) and any("conv1d.weight" in n for n in mask.names)
    expected = oracle_gradients(model, mask, loss)
    tuner = sc.attach(model, mask)
    check(tuner, model, expected, loss)
    check(tuner, model, expected, loss)
    with torch.no_grad():  # a pass turns gradients on itself
        found = sc.saliency_scores(model, [{"input_ids": IDS, "labels": IDS}], "gradient", ["dt_proj", "conv1d"])
    for name, score in found.items():
        mine = score.reshape(-1)[mask.indices[name].long()]
        torch.testing.assert_close(mine, expected[name].abs(), rtol=1e-4, atol=1e-7)


def test_parameters_of_an_rnn_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(31, 12), nn.LSTM(12, 31)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.embed(ids))[0]  # type: ignore[no-any-return]

    model = Recurrent()
    with pytest.raises(sc.UserError, match="rnn.weight_ih_l0: the parameters of a LSTM cannot be adapted"):
        sc.attach(model, some_mask(model))
    with pytest.raises(sc.UserError, match="cannot be adapted"):
        sc.find_mask(model, metric="magnitude", targets="body")


class Towers(nn.Module):
    """Two towers that are called each by itself, of which one has a parameter that is only read (`attention.out_proj`)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Embedding(31, 12), nn.Linear(12, 12))
        self.vision = nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True))

    def forward(self) -> torch.Tensor:
        return (self.text(IDS) * self.vision(PICTURE)).mean()


PICTURE = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(7))


def both_towers(model: Any) -> torch.Tensor:
    return Towers.forward(model)  # not called as a module


def towers_step(tuner: sc.Tuner, model: nn.Module) -> None:
    both_towers(model).backward()
    with torch.no_grad():
        for values_K in tuner.parameters():
            assert values_K.grad is not None
            values_K.data -= 0.5 * values_K.grad  # as engines write
            values_K.grad = None


def test_what_is_only_read_is_evaluated_with_the_last_step_in_it_once_the_other_tower_is_decided() -> None:
    model, plain = Towers(), Towers()
    mask = some_mask(model, [n for n, _ in model.named_parameters() if "in_proj_bias" not in n], density=0.3)
    tuner = sc.attach(model, mask)
    for step in range(4):
        for _ in range(2):  # the second begins with the tower that is left to its modules then
            towers_step(tuner, model)
        with torch.no_grad():
            found = model.vision(PICTURE)
        tuner.sync()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(found, plain.vision(PICTURE), msg=lambda m, s=step: f"{s}: {m}")
    assert not hooks_of(model.text) and hooks_of(model.vision)
    assert not any(tuner.outside._open.values())


@pytest.mark.parametrize("build", [net, Towers])
def test_a_model_can_be_copied_and_pickled_after_any_step(build: Callable[[], nn.Module]) -> None:
    model = build()
    loss = both_towers if isinstance(model, Towers) else loss_of
    sc.attach(model, some_mask(model, [n for n, _ in model.named_parameters() if "in_proj_bias" not in n]))
    for _ in range(4):
        loss(model).backward()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert loss(twin).item() == loss(model).item()
            assert not any(twin._speft_tuner.outside._open.values())


def test_a_submodules_forward_that_was_interrupted_ends_where_one_above_begins() -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupt

    model = Reader(WAYS["plainly"])
    mask = some_mask(model)
    tuner = sc.attach(model, mask)
    train(tuner, model, 2)
    hook = model.blocks[0].called.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(Interrupt):
        model.blocks[0](torch.randn(2, 12))
    hook.remove()
    assert any(tuner.outside._open.values())
    check(tuner, model, oracle_gradients(_plain(model, tuner), mask))
    assert not any(tuner.outside._open.values())
    train(tuner, model, 1)
    with torch.no_grad():
        found = model(IDS)
        assert torch.equal(found, _plain(model, tuner)(IDS))
