"""Inputs made again from what autograd keeps: the same bits, only where it is safe, and nothing saved beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import pico
import speft_core as sc
from attached import some_mask
from speft_core.ops.inputs import Inputs
from speft_core.ops.layout import Layout
from speft_core.ops.native import native_entries
from speft_core.ops.recipes import Recipe, hooks_forbid, recipe_of, sharded

SHAPE = (2, 5, 8)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), dtype=torch.float64).to(dtype).requires_grad_()


def rms_norm(dtype: torch.dtype) -> torch.Tensor:
    hidden, weight = leaf(dtype=dtype), torch.randn(8).to(dtype)
    wide = hidden.to(torch.float32) if dtype in (torch.bfloat16, torch.float16) else hidden
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)


def attention(dtype: torch.dtype) -> torch.Tensor:
    heads = [leaf(2, 4, 5, 2, dtype=dtype) for _ in range(3)]
    return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(2, 5, 8)


MADE: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "gated": lambda d: functional.silu(leaf(dtype=d)) * leaf(dtype=d),
    "rms_norm": rms_norm,
    "broadcast": lambda d: leaf(dtype=d) * leaf(5, 1, dtype=d),
    "relu": lambda d: torch.relu(leaf(dtype=d)),
    "tanh": lambda d: torch.tanh(leaf(dtype=d)),
    "sigmoid_viewed": lambda d: torch.sigmoid(leaf(dtype=d)).view(5, 2, 8),
    "transposed": lambda d: torch.tanh(leaf(dtype=d)).transpose(0, 1).reshape(10, 8),
    "attention": attention,
}
OTHER: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": leaf,
    "no_gradient": lambda: torch.randn(SHAPE),
    "scaled": lambda: leaf() * 2,
    "sum": lambda: leaf() + leaf(),
    "frozen_times_leaf": lambda: torch.randn(8) * leaf(),
    "changed_in_place": lambda: torch.tanh(leaf()).clone().mul_(3.0).add_(1.0),
    "second_output": lambda: torch.tanh(leaf()).chunk(2, dim=1)[1],
    "second_output_copied": lambda: torch.tanh(leaf()).chunk(2, dim=1)[1].clone(),
    "second_output_transposed": lambda: torch.tanh(leaf()).chunk(2, dim=1)[1].transpose(0, 1).reshape(-1, 8),
    "second_output_copied_and_transposed": lambda: torch.tanh(leaf()).chunk(2, dim=1)[1].clone().transpose(0, 1).reshape(-1, 8),
    "frozen_is_wider": lambda: torch.randn(3, 1, 8) * (leaf(5, 8) * leaf(5, 8)),
    "product_of_a_frozen": lambda: torch.randn(8) * (torch.randn(8) * leaf()),
    "rounded_between": lambda: torch.randn(8) * (leaf() * leaf()).half().float(),
    "widened_between": lambda: torch.randn(8) * (leaf() * leaf()).double().float(),
    "transposed_twice": lambda: torch.tanh(leaf()).transpose(0, 1).transpose(0, 1).reshape(10, 8),
}



def gathered(recipe: Recipe, layout: Layout) -> torch.Tensor:
    """The layout's columns of the input, from the factors."""
    inputs = Inputs(recipe.factors(), recipe=recipe)
    return inputs.gather(inputs.picks(layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(MADE))
def test_the_input_is_made_again_to_the_bit(name: str, dtype: torch.dtype) -> None:
    x = MADE[name](dtype)
    recipe = recipe_of(x)
    assert recipe is not None
    everything = Layout.of(torch.arange(8, dtype=torch.int32), (1, 8))
    some = Layout.of(torch.tensor([1, 2, 6], dtype=torch.int32), (1, 8))
    x_TI = x.detach().reshape(-1, 8)
    assert torch.equal(gathered(recipe, everything), x_TI)
    assert torch.equal(gathered(recipe, some), x_TI[:, [1, 2, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(MADE))
def test_the_compiled_plan_reads_the_factors_where_they_lie(name: str, dtype: torch.dtype) -> None:
    """The same bits as from the input itself, for all readers, with grad_y in any shape and order."""
    x = MADE[name](dtype)
    layout = Layout.of(torch.tensor([0, 3, 9, 22, 23, 33], dtype=torch.int32), (5, 8))
    grad_y = torch.randn(*x.shape[:-1], 5).to(dtype)
    expected_K = native_entries(Inputs([(x.detach().reshape(-1, 8), dtype)]), grad_y.reshape(-1, 5), layout)
    recipe = recipe_of(x)
    assert recipe is not None
    recipe.readers = 3
    for given in (grad_y, grad_y.mT.contiguous().mT, grad_y.reshape(-1, 5)):
        found_K = native_entries(Inputs(recipe.factors(), recipe=recipe), given, layout)
        assert torch.equal(found_K, expected_K)
    assert not recipe._read


@pytest.mark.parametrize("name", list(OTHER))
def test_any_other_input_has_no_recipe_or_a_true_one(name: str) -> None:
    x = OTHER[name]()
    recipe = recipe_of(x)
    if recipe is not None:
        everything = Layout.of(torch.arange(8, dtype=torch.int32), (1, 8))
        assert torch.equal(gathered(recipe, everything), x.detach().reshape(-1, 8))
    else:
        assert name != "attention"


@pytest.mark.parametrize("backward", ["compact", "sampled", "dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(MADE) + list(OTHER))
def test_gradients_with_and_without_a_recipe_agree(name: str, dtype: torch.dtype, backward: str) -> None:
    x = (MADE[name](dtype) if name in MADE else OTHER[name]()).to(dtype)
    layer = nn.Linear(8, 6).to(dtype)
    tuner = sc.attach(layer, some_mask(layer, ["weight"], density=0.3), backward=backward)
    grad_y = torch.randn(*x.shape[:-1], 6).to(dtype)
    layer(x).backward(grad_y, retain_graph=True)
    expected = (grad_y.reshape(-1, 6).double().T @ x.detach().reshape(-1, 8).double()).reshape(-1)
    expected = expected[tuner.mask.indices["weight"].long()]
    found = tuner.values["weight"].grad
    assert found is not None
    assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


def saved_bytes(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Bytes of distinct storages saved for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run().backward()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_keeps_nothing_above_the_floor(dtype: torch.dtype) -> None:
    model = pico.llama(dtype=dtype)
    batch = pico.batch(model, rows=4, length=32)
    batch["attention_mask"].fill_(1)
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    floor = saved_bytes(model, lambda: model(**batch).loss)
    mask = sc.find_mask(model, metric="random", budget=sc.Budget(density=0.02, of="targets"))
    sc.attach(model, mask)
    ours = saved_bytes(model, lambda: model(**batch).loss)
    hook.remove()
    assert floor > 0
    assert ours - floor <= 0.01 * floor


def test_layers_that_share_an_input_keep_its_columns_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 5, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x) + self.c(x)

    model = Three()
    indices = {"a.weight": [3, 9], "b.weight": [9, 40], "c.weight": [3, 64 + 11]}
    mask = sc.SparsityMask({n: torch.tensor(i, dtype=torch.int32) for n, i in indices.items()}, dict.fromkeys(indices, (5, 64)))
    tuner = sc.attach(model, mask)
    x = leaf(100, 64)
    first = saved_bytes(model, lambda: model(x).sum())
    grads = {n: v.grad for n, v in tuner.values.items()}
    again = saved_bytes(model, lambda: model(x).sum())
    assert first == 3 * 2 * 100 * 4  # each its own columns, until they have met
    assert again == 4 * 100 * 4  # columns 3, 9, 11 and 40, once
    for name, values_K in tuner.values.items():
        expected = x.detach().sum(0)[torch.tensor(indices[name]) % 64]
        torch.testing.assert_close(grads[name], 2 * expected)  # .grad is the tensor that the second backward added to
        torch.testing.assert_close(values_K.grad, 2 * expected)
    x.data.add_(1.0)
    with torch.no_grad():
        x.add_(1.0)  # changed in place: what the first readers left on it is not trusted
    for values_K in tuner.values.values():
        values_K.grad = None
    model(x).sum().backward()
    for name, values_K in tuner.values.items():
        torch.testing.assert_close(values_K.grad, x.detach().sum(0)[torch.tensor(indices[name]) % 64])


def test_columns_can_be_kept_in_bf16() -> None:
    layer = nn.Linear(64, 5)
    mask = some_mask(layer, ["weight"], density=0.05)
    sizes, grads = [], []
    for dtype in (None, torch.bfloat16):
        tuner = sc.attach(layer, mask, keep_dtype=dtype)
        torch.manual_seed(0)
        x = leaf(100, 64)
        sizes.append(saved_bytes(layer, lambda x=x: layer(x).square().sum()) - 100 * 5 * 4)
        grads.append(tuner.values["weight"].grad)
        tuner.detach()
    assert sizes[0] == 2 * sizes[1] > 0
    assert (grads[0] - grads[1]).norm() <= 2e-2 * grads[0].norm()
    assert not torch.equal(grads[0], grads[1])
    with pytest.raises(sc.UserError, match="keep_dtype must be None or one of"):
        sc.attach(layer, mask, keep_dtype=torch.int8)


def test_a_librarys_hooks_and_sharded_weights_forbid_recipes() -> None:
    from torch.utils.checkpoint import checkpoint

    seen: list[bool] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(hooks_forbid())
        return x.sin()

    checkpoint(block, leaf(), use_reentrant=False).sum().backward()
    assert seen == [True, True]
    with torch.autograd.graph.save_on_cpu():
        assert hooks_forbid()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not hooks_forbid()
    assert not hooks_forbid()
    for sign in ("ds_id", "_fsdp_flattened"):
        weight = nn.Parameter(torch.zeros(2))
        assert not sharded(weight)
        setattr(weight, sign, True)
        assert sharded(weight)
    assert sharded(torch.zeros(2))


class _OfALibrary:
    """What a library might put between autograd and its tensors: an object that is called."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("library", ["torch", "deepspeed", "accelerate.hooks", "transformers", "fairscale.nn", "ours", "torchish"])
@pytest.mark.parametrize("made", ["function", "object"])
def test_hooks_are_told_by_the_library_they_come_from(monkeypatch: pytest.MonkeyPatch, library: str, made: str) -> None:
    if made == "function":
        hook: Callable[[torch.Tensor], torch.Tensor] = lambda t: t  # noqa: E731
        hook.__module__ = library
    else:
        monkeypatch.setattr(_OfALibrary, "__module__", library)
        hook = _OfALibrary()
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        assert hooks_forbid() == (library.split(".")[0] not in ("ours", "torchish"))


def test_hooks_are_seen_while_pytorch_traces() -> None:
    tracing = torch._C._autograd._saved_tensors_hooks_set_tracing
    with torch.autograd.graph.save_on_cpu():
        before = tracing(True)
        try:
            assert hooks_forbid()
        finally:
            tracing(before)
    with torch.autograd.graph.saved_tensors_hooks(len, lambda t: t):  # a builtin function belongs to no library
        assert not hooks_forbid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_numbers_are_rounded_to_the_products_dtype_first(dtype: torch.dtype) -> None:
    whole = torch.tensor([257, 258, 0, 1, 4099, -513, 2, 3])  # not all of them are numbers of bf16 or fp16
    for product in (whole * (leaf(dtype=dtype) * leaf(dtype=dtype)), (leaf(dtype=dtype) * leaf(dtype=dtype)) * (whole > 1)):
        recipe = recipe_of(product)
        assert recipe is not None and all(f.is_floating_point() for f, _ in recipe.factors())
        everything = Layout.of(torch.arange(8, dtype=torch.int32), (1, 8))
        assert torch.equal(gathered(recipe, everything).reshape(product.shape), product.detach())


@pytest.mark.parametrize("change", ["gone", "other arguments"])
def test_where_hooks_cannot_be_seen_none_is_trusted(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change == "gone":
        monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    else:
        monkeypatch.setattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda: None)
    assert hooks_forbid()


@pytest.mark.parametrize("place", ["first", "second"])
def test_what_was_moved_to_another_device_has_no_recipe(place: str) -> None:
    here, weight = (leaf() * leaf()).to("meta"), torch.randn(8, device="meta")
    assert recipe_of(weight * here if place == "second" else here * weight) is None
    assert recipe_of(torch.zeros((), requires_grad=True) * torch.zeros((), requires_grad=True)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_with_a_plain_number_is_kept(dtype: torch.dtype) -> None:
    product = leaf(dtype=dtype) * leaf(dtype=dtype)
    assert recipe_of(product) is not None
    for scaled in (product * 0.1, 0.1 * product):  # autograd keeps the number as float64 on the CPU, wherever the model is
        assert recipe_of(scaled) is None
    assert recipe_of(product * torch.full((8,), 0.1, dtype=dtype)) is not None


def test_dimensions_may_be_counted_from_the_end() -> None:
    x = torch.tanh(leaf()).transpose(-3, -2).reshape(10, 8)
    recipe = recipe_of(x)
    assert recipe is not None
    everything = Layout.of(torch.arange(8, dtype=torch.int32), (1, 8))
    assert torch.equal(gathered(recipe, everything), x.detach())


def test_layers_that_read_one_input_read_its_factors_once() -> None:
    first, second = (torch.randn(10, 8, requires_grad=True) for _ in range(2))
    reads: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: reads.append(1) or t):
        x = first * second
    recipe = recipe_of(x)
    assert recipe is not None and recipe_of(x) is recipe
    assert recipe_of(first * second) is not recipe
    recipe.readers = 3
    for left, count in ((2, 2), (1, 2), (0, 2), (-1, 4), (-2, 6)):  # after the last, as in a second backward, each reads for itself
        factors = recipe.factors()
        assert (recipe.readers, len(reads)) == (left, count)
        assert torch.equal(factors[0][0] * factors[1][0], x)
        factors.clear()  # a list of one's own
    assert not recipe._read


def test_an_input_changed_in_place_has_a_recipe_of_its_own() -> None:
    x = torch.randn(10, 8, requires_grad=True) * torch.randn(10, 8, requires_grad=True)
    recipe = recipe_of(x)
    x.add_(1)
    assert recipe is not None and recipe_of(x) is None
