"""What a merge says of itself: who went in, how, and with what figures; and every refusal, word for word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.merge import (
    check_same_base,
    make_recipe,
    merge,
    merge_report,
    merged_print,
    source_names,
    stack_deltas,
    subtract,
)
from speft_core.merge_methods import METHODS


def delta(values: dict[int, float], size: int = 8, dtype: torch.dtype = torch.float32) -> SparseDelta:
    indices_K = torch.tensor(sorted(values), dtype=torch.int32)
    return SparseDelta(indices_K, torch.tensor([values[i] for i in sorted(values)], dtype=torch.float32).to(dtype), (size,))


def one(values: dict[int, float], config: AdapterConfig | None = None, **more: Any) -> SparseAdapter:
    return SparseAdapter({"w": delta(values, **more)}, {}, config or AdapterConfig())


CONFIG: dict[str, Any] = dict(
    base_model_name_or_path="acme/base", base_model_revision="abc", task_type="CAUSAL_LM", metric="snip", scope="global",
    targets=["q", "v"], library_versions={"torch": "2"}, random={"seed": 1}, extra={"note": 1},
)  # fmt: skip
FIELDS = ("base_model_revision", "task_type", "metric", "scope")


def test_a_merge_records_its_sources_and_what_they_agree_on() -> None:
    a, b = one({0: 1.0, 3: 2.0}, AdapterConfig(**CONFIG)), one({3: -1.0}, AdapterConfig(**{**CONFIG, "targets": ["v", "o"]}))
    config = merge([a, b], "ties", [0.5, 2], 0.5, seed=4, names=["x", "y"]).config
    record = config.extra.pop("merge")
    assert config == AdapterConfig(**{**CONFIG, "targets": ["q", "v", "o"], "random": None, "extra": {}})
    assert record.pop("figures")["nnz"] == [2, 1]
    sources = [{"name": "x", "nnz": 2}, {"name": "y", "nnz": 1}]
    assert record == {"method": "ties", "weights": [0.5, 2.0], "density": 0.5, "sources": sources}
    for field in FIELDS:
        other = one({1: 1.0}, AdapterConfig(**{**CONFIG, field: "other"}))
        merged = vars(merge([a, b, other]).config)
        assert {f: merged[f] for f in FIELDS} == {f: None if f == field else CONFIG[f] for f in FIELDS}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_a_method_uses_is_recorded(method: str) -> None:
    row = METHODS[method]
    record = make_recipe(2, method, [1, 3] if row.weights else None, 0.25 if row.density else None, 7, None).record()
    expected: dict[str, Any] = {"method": method}
    expected |= {"weights": [1.0, 3.0]} if row.weights else {}
    expected |= {"density": 0.25} if row.density else {}
    assert record == expected | ({"seed": 7} if method in ("dare", "dare_ties") else {})
    plain = make_recipe(3, method, [1.0] * 3 if method == "weighted" else None, None, 0, torch.bfloat16)
    assert (plain.weights, plain.density, plain.dtype) == ((1.0, 1.0, 1.0), 1.0, torch.bfloat16)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"count": 0}, "merging needs at least one adapter, got none"),
    ({"method": "tie"}, f"method must be one of {', '.join(METHODS)}, got 'tie'. Did you mean 'ties'?"),
    ({"weights": [1, 2]}, "method 'sum' takes no weights; use 'weighted'"),
    ({"method": "weighted"}, "method 'weighted' needs weights, one for each adapter"),
    ({"density": 0.5}, "method 'sum' takes no density; those that do: ties, dare, dare_ties, magnitude"),
    ({"method": "mean", "weights": [1]}, "weights must be one for each adapter (2), got 1"),
    ({"method": "mean", "weights": [1, -1]}, "weights must be finite (and for 'mean' not add up to 0), got [1.0, -1.0]"),
    ({"method": "ties", "weights": [1, float("inf")]}, "weights must be finite (and for 'mean' not add up to 0), got [1.0, inf]"),
    ({"method": "ties", "density": 0.0}, "density must lie in (0, 1], a share of each adapter's own entries, got 0.0"),
    ({"method": "ties", "density": 1.01}, "density must lie in (0, 1], a share of each adapter's own entries, got 1.01"),
    ({"dtype": torch.int8}, "dtype must be a floating point type, got torch.int8"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_refusals_word_for_word(change: dict[str, Any], message: str) -> None:
    asked = {"count": 2, "method": "sum", "weights": None, "density": None, "seed": 0, "dtype": None, **change}
    with pytest.raises(UserError) as caught:
        make_recipe(**asked)
    assert str(caught.value) == message
    allowed = make_recipe(1, "ties", [-2], 1.0, 0, torch.float64)  # the edges are allowed, and weights that add up to 0 but for mean
    assert allowed.weights == (-2.0,) and make_recipe(2, "negate", [1, -1], None, 0, None).weights == (1.0, -1.0)


def test_sources_have_names() -> None:
    assert source_names(2, None) == ["adapter 1", "adapter 2"] and source_names(1, ("x",)) == ["x"]
    with pytest.raises(UserError, match=r"^names must be one for each adapter \(2\), got 3$"):
        source_names(2, ["a", "b", "c"])


def printed(sample: str | None = None, shape: list[int] | None = None, base: str | None = None) -> SparseAdapter:
    record = {k: v for k, v in {"sample": sample, "shape": shape}.items() if v is not None}
    return SparseAdapter({"w": delta({1: 1.0})}, {}, AdapterConfig(base_model_name_or_path=base), {"w": record} if record else {})


UNPROVEN = "a and b have different bases, 'x' and 'y'; if they are the same model, pass check_base=False"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (printed("aa", [8]), printed("aa", [8]), None),
        (printed("aa", base="x"), printed("aa", base="y"), None),  # the sample proves it
        (printed(base="x"), printed("aa", base="y"), UNPROVEN),
        (printed("aa", base="x"), printed(base="y"), UNPROVEN),
        (printed(base="x"), printed(base=None), None),
        (printed(base=None), printed(base="y"), None),
        (printed("aa"), printed("bb"), "a and b were trained on different bases: w has other values"),
        (printed("aa", [8]), printed("aa", [4, 2]), "a and b have different bases: w has shapes (8,) and (4, 2)"),
        (printed("aa", [8]), printed("aa"), None),
    ],
)
def test_bases_are_told_apart_by_what_is_known_of_them(first: SparseAdapter, second: SparseAdapter, message: str | None) -> None:
    if message is None:
        check_same_base([first, second], ["a", "b"])
        return
    same_as_first = SparseAdapter(first.deltas, {}, first.config, first.fingerprint)
    for sources, names in (([first, second], ["a", "b"]), ([first, same_as_first, second], ["a", "c", "b"])):
        with pytest.raises(UserError) as caught:
            check_same_base(sources, names)
        assert str(caught.value) == message
    third = SparseAdapter({"v": delta({1: 1.0})}, {}, AdapterConfig(base_model_name_or_path="z"))
    if first.config.base_model_name_or_path is not None:  # what proved the second proves nothing of the third
        with pytest.raises(UserError, match="'z'"):
            check_same_base([first, same_as_first, third], ["a", "c", "b"])


def test_every_shared_tensor_is_compared_not_the_first_adapters_alone() -> None:
    def on(name: str, record: dict[str, Any]) -> SparseAdapter:
        return SparseAdapter({name: delta({1: 1.0})}, {}, AdapterConfig(), {name: record})

    sources = [on("q", {"sample": "aa"}), on("v", {"shape": [8]}), on("v", {"sample": "bb"}), on("v", {"sample": "cc"})]
    check_same_base(sources[:3], ["a", "b", "c"])
    with pytest.raises(UserError, match="^c and d were trained on different bases: v has other values$"):
        check_same_base(sources, ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="^c and d were trained on different bases"):
        merge(sources, names=["a", "b", "c", "d"])


@pytest.mark.parametrize("second", [None, [8]])
def test_a_record_that_knows_less_takes_no_ones_place(second: list[int] | None) -> None:
    sources = [printed(shape=[8]), printed(shape=second), printed("aa", [8]), printed(), printed("bb", [8])]
    check_same_base(sources[:4], ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="^c and e were trained on different bases: w has other values$"):
        check_same_base(sources, ["a", "b", "c", "d", "e"])
    with pytest.raises(UserError, match=r"^a and c have different bases: w has shapes \(8,\) and \(4, 2\)$"):
        check_same_base([*sources[:2], printed(shape=[4, 2])], ["a", "b", "c"])


VALUES = st.dictionaries(st.integers(0, 7), st.integers(-8, 8).map(lambda n: n / 4), max_size=8)  # exact in fp32


@given(st.lists(st.one_of(st.none(), VALUES), min_size=1, max_size=3).filter(lambda rows: any(r is not None for r in rows)))
def test_a_stack_has_each_adapters_values_where_it_has_entries(rows: list[dict[int, float] | None]) -> None:
    indices_U, stack = stack_deltas("w", [None if r is None else delta(r) for r in rows], [0.5] * len(rows))
    union = sorted({i for r in rows if r for i in r})
    assert indices_U.tolist() == union and stack.name == "w" and stack.weights_A.tolist() == [0.5] * len(rows)
    assert stack.values_AU.tolist() == [[(r or {}).get(i, 0.0) for i in union] for r in rows]
    assert stack.present_AU.tolist() == [[i in (r or {}) for i in union] for r in rows]
    assert {stack.values_AU.dtype, stack.weights_A.dtype} == {torch.float32} and stack.present_AU.dtype == torch.bool


def test_one_double_makes_the_stack_double_and_other_shapes_are_refused() -> None:
    _, stack = stack_deltas("w", [delta({1: 1.0}), None, delta({2: 0.1}, dtype=torch.float64)], [1.0, 1.0, 0.1])
    assert stack.values_AU.dtype == stack.weights_A.dtype == torch.float64
    assert stack.values_AU[2, 1].item() == torch.tensor(0.1).double().item() and stack.weights_A[2].item() == 0.1
    message = r"^w has different shapes in the adapters: \(6,\), \(8,\); they have different bases$"
    with pytest.raises(UserError, match=message):
        stack_deltas("w", [delta({1: 1.0}), delta({1: 1.0}, 6)], [1.0, 1.0])


@given(VALUES, VALUES)
def test_subtracting_takes_values_away_and_keeps_what_is_not_zero(both: dict[int, float], part: dict[int, float]) -> None:
    found = subtract(one(both), one(part))
    expected = {i: both.get(i, 0.0) - part.get(i, 0.0) for i in both | part}
    kept = {i: v for i, v in expected.items() if v != 0 or i not in part}
    left = found.deltas.get("w", delta({}))
    assert dict(zip(left.indices_K.tolist(), left.values_K.tolist(), strict=True)) == kept
    assert ("w" in found.deltas) == bool(kept)


def test_what_is_left_of_a_sum_keeps_its_dtype_heads_and_story_but_not_the_merge() -> None:
    a, b = one({0: 1.0, 3: 2.0}, AdapterConfig(**CONFIG), dtype=torch.bfloat16), one({3: 1.0}, dtype=torch.float32)
    a.dense["head"] = torch.ones(2)
    a = SparseAdapter(a.deltas, a.dense, AdapterConfig(**{**CONFIG, "extra": {"note": 1, "merge": {"method": "sum"}}}))
    left = subtract(a, b)
    assert left.deltas["w"].values_K.dtype == torch.bfloat16 and left.dense.keys() == {"head"}
    assert left.config == AdapterConfig(**{**CONFIG, "random": None}) and "merge" in a.config.extra
    gone = subtract(SparseAdapter({}), SparseAdapter({"v": delta({2: 3.0})}))
    assert gone.deltas["v"].values_K.tolist() == [-3.0] and gone.deltas["v"].shape == (8,)


def test_what_a_sum_had_alone_stays_and_what_is_left_is_fingerprinted() -> None:
    record = {"shape": [8], "sample": "s", "base_float32": "h"}
    merged = SparseAdapter({n: delta({1: 1.0, 2: 2.0}) for n in "abc"}, {}, AdapterConfig(), {n: dict(record) for n in "abc"})
    part = SparseAdapter({n: delta({2: 2.0 if n == "b" else 1.0}) for n in "bc"})
    left = subtract(merged, part)  # of "a", which comes first, nothing is taken
    assert {n: d.values_K.tolist() for n, d in left.deltas.items()} == {"a": [1.0, 2.0], "b": [1.0], "c": [1.0, 1.0]}
    assert left.fingerprint == {"a": record, "b": {"shape": [8], "sample": "s"}, "c": record}
    with pytest.raises(UserError, match=r"^w has different shapes"):
        subtract(one({1: 1.0}), SparseAdapter({"w": delta({1: 1.0}, 6)}))


def test_a_print_is_kept_whole_only_where_the_positions_are_the_sources_own() -> None:
    record = {"shape": [8], "sample": "s", "base_float32": "h"}
    a, b = one({0: 1.0, 3: 2.0}), one({3: 1.0})
    a.fingerprint["w"] = record
    merged = merge([a, b])
    assert merged.fingerprint == {"w": record}  # the union is a's entries
    assert merged.fingerprint["w"] is not record
    assert merge([one({5: 1.0}), a, b]).fingerprint == {"w": {"shape": [8], "sample": "s"}}
    assert merge([b, one({5: 1.0})]).fingerprint == {}
    b.fingerprint["w"] = {"shape": [8], "sample": "t"}
    assert merged_print("w", delta({7: 1.0}), [b, a]) == {"shape": [8], "sample": "t"}  # the first that has one
    assert merged_print("v", delta({7: 1.0}), [b, a]) == {}
    b.fingerprint["v"] = record
    assert merged_print("v", delta({7: 1.0}), [b]) == {}  # a print of a tensor that is not changed


def test_the_report_is_of_the_plain_sum_in_double() -> None:
    big = one({0: 60000.0}, dtype=torch.float16)
    (row,) = merge_report([big, big])
    assert (row.name, row.merged_norm, row.norms, row.overlap, row.sign_conflicts) == ("w", 120000.0, [60000.0] * 2, 1, 0)
    with pytest.raises(UserError, match=r"^w: the merged values do not fit torch.float16; pass dtype=torch.float32$"):
        merge([big, big])


def test_tensors_come_in_the_order_they_are_met_and_dtypes_widen() -> None:
    a = SparseAdapter({"y": delta({1: 1.0}, dtype=torch.bfloat16), "x": delta({1: 1.0})})
    b = SparseAdapter({"z": delta({1: 1.0}), "y": delta({2: 1.0}, dtype=torch.float64)})
    merged = merge([a, b])
    assert list(merged.deltas) == ["y", "x", "z"]
    assert [d.values_K.dtype for d in merged.deltas.values()] == [torch.float64, torch.float32, torch.float32]


def test_dense_tensors_go_along_where_all_that_have_one_agree_to_the_dtype() -> None:
    def with_heads(**dense: torch.Tensor) -> SparseAdapter:
        return SparseAdapter({"w": delta({1: 1.0})}, dense)

    a = with_heads(same=torch.ones(2), other=torch.ones(2), kind=torch.ones(2), mine=torch.ones(1), size=torch.ones(2))
    b = with_heads(same=torch.ones(2), other=torch.zeros(2), kind=torch.ones(2).half(), size=torch.ones(3))
    for order in ([a, b], [b, a], [a, b, a]):
        merged = merge(order)
        assert merged.dense.keys() == {"same", "mine"} and torch.equal(merged.dense["same"], torch.ones(2))
        assert merged.config.extra["merge"]["heads_left_apart"] == ["kind", "other", "size"]
    assert "heads_left_apart" not in merge([a, a]).config.extra["merge"]


def test_a_layer_is_left_apart_whole_and_a_body_without_its_head_does_no_task() -> None:
    def with_head(weight: float) -> SparseAdapter:
        head = {"score.weight": torch.full((2, 2), weight), "score.bias": torch.zeros(2), "other.bias": torch.zeros(2)}
        return SparseAdapter({"w": delta({1: 1.0})}, head, AdapterConfig(task_type="SEQ_CLS"))

    merged = merge([with_head(1.0), with_head(2.0)])  # biases that start at zero and were not trained
    assert merged.dense.keys() == {"other.bias"} and merged.config.task_type is None
    assert merged.config.extra["merge"]["heads_left_apart"] == ["score.bias", "score.weight"]
    assert merge([with_head(1.0), with_head(1.0)]).config.task_type == "SEQ_CLS"


def test_draws_are_of_seed_0_unless_told() -> None:
    given = one({i: float(i + 1) for i in range(8)})
    drawn = {seed: merge([given], "dare", density=0.5, **({} if seed is None else {"seed": seed})) for seed in (None, 0, 1)}
    indices = {seed: merged.deltas["w"].indices_K.tolist() for seed, merged in drawn.items()}
    assert indices[None] == indices[0] != indices[1]
