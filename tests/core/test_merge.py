"""Merging: parity with PEFT's merge utilities on the densified changes, and the algebra that each method must obey."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.merge import merge, merge_report, stack_deltas, subtract
from speft_core.merge_methods import METHODS, _drawn

SHAPES = {"a.weight": (9, 7), "b.weight": (31,), "c.weight": (4, 5, 3)}


def adapter(
    seed: int, density: float = 0.4, dtype: torch.dtype = torch.float32, positions: Any = None, shapes: Any = SHAPES
) -> SparseAdapter:
    """A random adapter; `positions(name, numel)` may give its indices."""
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        kept = torch.rand(numel, generator=draw) < density
        indices = positions(name, numel) if positions else torch.nonzero(kept).flatten().int()
        deltas[name] = SparseDelta(indices, torch.randn(len(indices), generator=draw).to(dtype), shape)
    return SparseAdapter(deltas, {}, AdapterConfig(base_model_name_or_path="acme/base"))


def dense(one: SparseAdapter, name: str) -> torch.Tensor:
    return one.deltas[name].to_dense() if name in one.deltas else torch.zeros(SHAPES[name])


def same(a: SparseAdapter, b: SparseAdapter) -> bool:
    """Equal bit for bit: the same tensors, positions, dtypes and values."""
    return a.deltas.keys() == b.deltas.keys() and all(
        torch.equal(x.indices_K, b.deltas[n].indices_K)
        and x.values_K.dtype == b.deltas[n].values_K.dtype
        and torch.equal(x.values_K, b.deltas[n].values_K)
        for n, x in a.deltas.items()
    )


def peft_density(delta: SparseDelta, density: float) -> float:
    """The density over the dense tensor by which PEFT keeps as many entries as `density` of the kept ones."""
    return (int(density * delta.nnz) + 0.5) / delta.numel


WEIGHTS = [0.7, -0.3, 1.1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["weighted", "magnitude", "ties", "dare", "dare_ties"])
def test_parity_with_peft(method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [adapter(seed * 10 + i, d) for i, d in enumerate((0.4, 0.6, 0.2))]
    density = None if method == "weighted" else 0.55
    merged = merge(adapters, method, WEIGHTS, density, seed=3)
    for name in SHAPES:
        tensors, weights = [dense(a, name) for a in adapters], torch.tensor(WEIGHTS)
        # PEFT takes one density for all, over dense tensors; it is given each adapter's own through its pruning function.
        counts = iter([peft_density(a.deltas[name], 0.55) for a in adapters])
        prune = merge_utils.magnitude_based_pruning
        monkeypatch.setattr(
            merge_utils,
            "magnitude_based_pruning",
            lambda tensor, density, prune=prune, counts=counts: prune(tensor, next(counts)),
        )
        indices_U, stack = stack_deltas(name, [a.deltas[name] for a in adapters], WEIGHTS)
        draws = []
        for kept_U in _drawn(stack, 0.55, 3):
            mask = torch.zeros(SHAPES[name]).view(-1)
            mask[indices_U[kept_U].long()] = 1.0
            draws.append(mask.view(SHAPES[name]))
        masks = iter(draws)
        monkeypatch.setattr(torch, "bernoulli", lambda tensor, masks=masks: next(masks))
        theirs = {"weighted": "task_arithmetic", "magnitude": "magnitude_prune", "dare": "dare_linear"}.get(method, method)
        options = {} if method == "weighted" else {"density": 0.55}
        expected = getattr(merge_utils, theirs)(tensors, weights, **options)
        monkeypatch.undo()
        assert expected.abs().sum() > 0
        torch.testing.assert_close(dense(merged, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("weighted", "negate")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_one_adapter_is_the_identity(method: str, dtype: torch.dtype) -> None:
    one = adapter(1, dtype=dtype)
    assert same(merge([one], method), one)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 10_000), min_size=2, max_size=4, unique=True),
    st.sampled_from(["sum", "mean", "ties", "magnitude", "dare", "dare_ties"]),
)
def test_the_order_of_adapters_does_not_matter(seeds: list[int], method: str) -> None:
    density = 0.5 if METHODS[method].density else None
    adapters = [adapter(s) for s in seeds]
    first = merge(adapters, method, density=density)
    for order in list(permutations(adapters))[1:4]:
        other = merge(order, method, density=density)
        for name in SHAPES:
            assert torch.equal(first.deltas[name].indices_K, other.deltas[name].indices_K)
            torch.testing.assert_close(first.deltas[name].values_K, other.deltas[name].values_K, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000))
def test_sum_is_associative_to_rounding(seed: int) -> None:
    a, b, c = (adapter(seed + i) for i in range(3))
    left, right, at_once = merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([a, b, c])
    for name in SHAPES:
        torch.testing.assert_close(dense(left, name), dense(right, name), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dense(left, name), dense(at_once, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_merge_then_subtract_restores_disjoint_supports_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    def part(which: int) -> Any:
        def positions(name: str, numel: int) -> torch.Tensor:
            order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed + numel))
            return order[which * 8 : which * 8 + 8].sort().values.int()

        return positions

    a, b, c = (adapter(seed + 100 * w, dtype=dtype, positions=part(w)) for w in range(3))
    a.deltas["a.weight"].values_K[2] = 0.0  # a trained entry that came out at zero is still the adapter's
    merged = merge([a, b, c])
    assert not same(merged, a)
    assert same(subtract(subtract(merged, b), c), a)
    assert same(subtract(merged, b), merge([a, c]))


def test_subtracting_a_tensor_the_sum_does_not_have_negates_it() -> None:
    a = adapter(1, shapes={"a.weight": (9, 7)})
    b = adapter(2, shapes={"b.weight": (31,)})
    gone = subtract(a, b)
    assert torch.equal(gone.deltas["b.weight"].values_K, -b.deltas["b.weight"].values_K)
    assert subtract(merge([a, b]), b).deltas.keys() == {"a.weight"}


def test_negation_undoes_a_sum() -> None:
    a, b = adapter(1), adapter(2)
    both = merge([a, b])
    undone = merge([both, merge([b], "negate")])
    for name in SHAPES:
        torch.testing.assert_close(dense(undone, name), dense(a, name), rtol=0, atol=1e-6)


def test_a_density_is_over_an_adapters_own_entries() -> None:
    sparse = adapter(4, density=0.1)  # over the dense tensor, 0.2 would keep everything
    for method in ("ties", "magnitude"):
        merged = merge([sparse], method, density=0.5)
        for name, delta in sparse.deltas.items():
            assert merged.deltas[name].nnz == int(0.5 * delta.nnz) < delta.nnz
            kept = merged.deltas[name].values_K.abs()
            assert kept.numel() == 0 or kept.min() >= delta.values_K.abs().median() - 1e-6


def test_dare_is_unbiased_and_seeded() -> None:
    one = adapter(1, shapes={"a.weight": (50, 50)})
    name = "a.weight"
    runs = [merge([one], "dare", density=0.5, seed=s) for s in range(200)]
    average = torch.stack([r.deltas[name].to_dense() for r in runs]).mean(dim=0)
    error = (average - one.deltas[name].to_dense()).abs().mean() / one.deltas[name].values_K.abs().mean()
    assert error < 0.08
    assert same(merge([one], "dare", density=0.5, seed=7), runs[7]) and not same(runs[7], runs[8])
    twice = merge([one, one], "dare", density=0.5)
    assert twice.nnz > 1.2 * runs[0].nnz  # the same adapter twice is drawn twice


def test_dtypes_and_tensors_that_only_one_has() -> None:
    a = adapter(1, dtype=torch.bfloat16, shapes={"a.weight": (9, 7)})
    b = adapter(2, dtype=torch.float16, shapes={"b.weight": (31,)})
    merged = merge([a, b])
    assert (
        merged.deltas["a.weight"].values_K.dtype == torch.bfloat16 and merged.deltas["b.weight"].values_K.dtype == torch.float16
    )
    both = merge([adapter(1, dtype=torch.bfloat16), adapter(2, dtype=torch.float16)])
    assert {d.values_K.dtype for d in both.deltas.values()} == {torch.float32}
    assert {d.values_K.dtype for d in merge([a, b], dtype=torch.float32).deltas.values()} == {torch.float32}


def test_figures() -> None:
    shape = (10,)
    a = SparseAdapter({"w": SparseDelta(torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1.0, 2.0, 2.0]), shape)})
    b = SparseAdapter(
        {"w": SparseDelta(torch.tensor([2, 3, 0], dtype=torch.int32).sort().values, torch.tensor([3.0, -1.0, 4.0]), shape)}
    )
    (row,) = merge_report([a, b])
    assert (row.nnz, row.union, row.overlap, row.sign_conflicts) == ([3, 3], 4, 2, 1)
    assert row.norms == pytest.approx([3.0, 26**0.5]) and row.merged_norm == pytest.approx((16 + 4 + 1 + 16) ** 0.5)
    figures = merge([a, b]).config.extra["merge"]["figures"]
    assert figures["overlap"] == 2 and figures["sign_conflicts"] == 1 and figures["union"] == 4


def test_heads_that_differ_are_left_apart() -> None:
    a, b = adapter(1), adapter(2)
    a.dense.update({"score.weight": torch.ones(2, 3), "shared": torch.ones(2), "mine": torch.ones(1)})
    b.dense.update({"score.weight": torch.zeros(2, 3), "shared": torch.ones(2)})
    merged = merge([a, b])
    assert set(merged.dense) == {"shared", "mine"}
    assert merged.config.extra["merge"]["heads_left_apart"] == ["score.weight"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"method": "sum", "weights": [1, 2]}, "use 'weighted'"),
        ({"method": "weighted"}, "needs weights"),
        ({"method": "weighted", "weights": [1]}, "one for each adapter"),
        ({"method": "weighted", "weights": [1, float("nan")]}, "finite"),
        ({"method": "mean", "weights": [1, -1]}, "not add up to 0"),
        ({"method": "sum", "density": 0.5}, "takes no density"),
        ({"method": "ties", "density": 0}, "density must lie in"),
        ({"method": "dare", "density": 1.5}, "density must lie in"),
        ({"method": "ties", "density": float("nan")}, "density must lie in"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"names": ["x"]}, "names must be"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge([adapter(1), adapter(2)], **options)


def test_no_adapters_at_all() -> None:
    with pytest.raises(UserError, match="at least one"):
        merge([])


def test_a_merge_that_overflows_says_so() -> None:
    big = SparseAdapter(
        {"w": SparseDelta(torch.tensor([0], dtype=torch.int32), torch.tensor([60000.0], dtype=torch.float16), (4,))}
    )
    with pytest.raises(UserError, match="do not fit"):
        merge([big, big])
    assert merge([big, big], dtype=torch.float32).deltas["w"].values_K.item() == 120000.0


def test_different_bases_are_refused() -> None:
    a, b = adapter(1), adapter(2, shapes={"a.weight": (7, 9)})
    with pytest.raises(UserError, match="a.weight has different shapes"):
        merge([a, b])
    a, b = adapter(1), adapter(2)
    a.fingerprint["b.weight"], b.fingerprint["b.weight"] = {"shape": [31]}, {"shape": [1, 31]}
    with pytest.raises(UserError, match=r"^adapter 1 and adapter 2 have different bases: b.weight has shapes \(31,\) and \(1, 31\)$"):
        merge([a, b])
    a.fingerprint["b.weight"] = {"shape": [31], "sample": "aa"}
    b.fingerprint["b.weight"] = {"shape": [31], "sample": "bb"}
    with pytest.raises(UserError, match="different bases: b.weight"):
        merge([a, b])
    assert merge([a, b], check_base=False).nnz
    b.fingerprint["b.weight"]["sample"] = "aa"
    other = SparseAdapter(b.deltas, {}, AdapterConfig(base_model_name_or_path="/home/x/base"), b.fingerprint)
    assert merge([a, other]).nnz  # the same model under another name: the samples prove it
    stranger = SparseAdapter(b.deltas, {}, AdapterConfig(base_model_name_or_path="acme/other"))
    with pytest.raises(UserError, match="'acme/base' and 'acme/other'"):
        merge([a, stranger])


def test_fingerprints_survive_where_positions_do() -> None:
    a = adapter(1, shapes={"a.weight": (9, 7)})
    b = adapter(2, shapes={"a.weight": (9, 7), "b.weight": (31,)})
    for one in (a, b):
        one.fingerprint.update(
            {n: {"shape": list(d.shape), "base_float32": f"{n}{id(one)}", "sample": "s"} for n, d in one.deltas.items()}
        )
    merged = merge([a, b])
    assert merged.fingerprint["b.weight"] == b.fingerprint["b.weight"]
    assert merged.fingerprint["a.weight"] == {"shape": [9, 7], "sample": "s"}
