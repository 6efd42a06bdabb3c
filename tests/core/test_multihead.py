"""Several heads on one body: one forward gives what each single model gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel

import pico
from speft_core import AdapterConfig, SparseAdapter, SparseDelta, SparsityMask, UserError, attach
from speft_core.bank import AdapterBank
from speft_core.merge import merge
from speft_core.multihead import MultiHeadModel, last_tokens

LLAMA_LAYER, BERT_LAYER = "model.layers.1.mlp.down_proj.weight", "bert.encoder.layer.0.attention.self.query.weight"


def classifier(labels: int = 3, seed: int = 0) -> PreTrainedModel:
    """A pico Llama with a classification head."""
    config = pico.llama().config
    config.num_labels = labels
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config).eval()


def adapter(
    model: PreTrainedModel, name: str, seed: int, head: dict[str, Any], positions: slice | None = None
) -> SparseAdapter:
    """Twenty random changes to one matrix, at random or given positions, and a head."""
    draw = torch.Generator().manual_seed(seed)
    weight = dict(model.named_parameters())[name]
    indices = (
        torch.randperm(weight.numel(), generator=draw)[:20] if positions is None else torch.arange(weight.numel())[positions]
    )
    indices = indices.sort().values.int()
    dense = {n: torch.randn(*shape, generator=draw) for n, shape in head.items()}
    return SparseAdapter(
        {name: SparseDelta(indices, torch.randn(len(indices), generator=draw), tuple(weight.shape))}, dense, AdapterConfig()
    )


def single(model: PreTrainedModel, one: SparseAdapter, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a model of its own with this body and this head."""
    alone = copy.deepcopy(model)
    labels = {t.shape[0] for n, t in one.dense.items()}.pop()
    head = alone.score if hasattr(alone, "score") else alone.classifier
    grown = torch.nn.Linear(head.in_features, labels, bias=head.bias is not None)
    setattr(alone, "score" if hasattr(alone, "score") else "classifier", grown)
    alone.config.num_labels = alone.num_labels = labels
    with one.applied(alone), torch.no_grad():
        return alone(**batch).logits


def inputs(model: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in pico.batch(model, **options).items() if k != "labels"}


@pytest.mark.parametrize(
    "outputs, problem, kind",
    [
        (1, None, "regression"),
        (2, None, "classification"),
        (1, "multi_label_classification", "classification"),
        (3, "regression", "regression"),
    ],
)
def test_the_kind_is_told_by_the_problem_or_the_outputs(outputs: int, problem: str | None, kind: str) -> None:
    head, told = {"score.weight": torch.ones(outputs, pico.HIDDEN)}, {"problem_type": problem} if problem else {}
    for model in (classifier(), pico.llama()):  # on the model's own head, and on the last hidden state
        assert MultiHeadModel(model, None, {"a": head}, labels={"a": told}).kinds == {"a": kind}
        assert MultiHeadModel(model, None, {"a": head}, {"a": "regression"}, labels={"a": told}).kinds == {"a": "regression"}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_one_forward_answers_every_task_as_its_own_model_would(kind: str) -> None:
    model = classifier() if kind == "llama" else pico.bert()
    name = LLAMA_LAYER if kind == "llama" else BERT_LAYER
    head = (
        (lambda n: {"score.weight": (n, 16)})
        if kind == "llama"
        else (lambda n: {"classifier.weight": (n, 16), "classifier.bias": (n,)})
    )
    a, b, c = (adapter(model, name, s, head(labels)) for s, labels in ((1, 2), (2, 5), (3, 1)))
    merged, batch = merge([a, b, c]), inputs(model, rows=4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    calls = []
    hook = model.base_model.register_forward_hook(lambda *_: calls.append(1))
    with MultiHeadModel(model, merged, heads={"sst2": a.dense, "topic": b.dense, "stsb": c.dense}) as heads, torch.no_grad():
        answers = heads(**batch)
    hook.remove()
    assert len(calls) == 1
    assert {t: o.kind for t, o in answers.items()} == {
        "sst2": "classification",
        "topic": "classification",
        "stsb": "regression",
    }
    for task, one in (("sst2", a), ("topic", b), ("stsb", c)):
        expected = single(model, SparseAdapter(merged.deltas, one.dense), batch)
        assert torch.equal(answers[task].logits, expected), task
        assert answers[task].logits.shape == (4, one.dense[next(iter(one.dense))].shape[0])
    assert not torch.equal(answers["sst2"].logits, single(model, SparseAdapter({}, a.dense), batch))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("left", [False, True])
def test_classification_regression_and_causal_heads_together_on_a_causal_model(tied: bool, left: bool) -> None:
    model = pico.llama(tied=tied)
    body = adapter(model, LLAMA_LAYER, 1, {})
    sst2, stsb = torch.randn(2, 16), torch.randn(1, 16)
    batch = inputs(model, rows=3)
    if left:
        batch = {k: v.flip(1) for k, v in batch.items()}
    with (
        MultiHeadModel(model, body, {"lm": {}, "sst2": {"score.weight": sst2}, "stsb": {"score.weight": stsb}}) as heads,
        torch.no_grad(),
    ):
        answers = heads(**batch)
        expected = model(**batch).logits
    assert torch.equal(answers["lm"].logits, expected)
    assert {t: o.kind for t, o in answers.items()} == {"lm": "causal", "sst2": "classification", "stsb": "regression"}
    for task, weight in (("sst2", sst2), ("stsb", stsb)):
        torch.manual_seed(0)
        config = copy.deepcopy(model.config)
        config.num_labels = weight.shape[0]
        alone = LlamaForSequenceClassification(config).eval()
        alone.model.load_state_dict(model.model.state_dict())
        with SparseAdapter(body.deltas, {"score.weight": weight}).applied(alone), torch.no_grad():
            assert torch.equal(answers[task].logits, alone(**batch).logits)


def test_a_causal_head_on_a_classifier() -> None:
    model, vocabulary = classifier(), torch.randn(64, 16)
    batch = inputs(model)
    with MultiHeadModel(model, None, {"own": {}, "lm": {"lm_head.weight": vocabulary}}) as heads, torch.no_grad():
        answers = heads(**batch)
        assert torch.equal(answers["own"].logits, model(**batch).logits)
        assert torch.equal(answers["lm"].logits, model.model(**batch).last_hidden_state @ vocabulary.T)
    with MultiHeadModel(model, None, {"lm": {"lm_head.weight": vocabulary}}) as heads, torch.no_grad():
        assert torch.equal(heads(**batch)["lm"].logits, answers["lm"].logits)


def test_a_causal_head_is_refused_where_the_causal_model_changes_its_logits() -> None:
    model = classifier()
    for name, harmless, value in (("final_logit_softcapping", None, 30.0), ("logits_scaling", 1, 8.0)):
        setattr(model.config, name, harmless)
        MultiHeadModel(model, None, {"lm": {"lm_head.weight": torch.randn(64, 16)}}).close()
        setattr(model.config, name, value)
        with pytest.raises(UserError, match=rf"{name}={value}; load the base as a causal model"):
            MultiHeadModel(model, None, {"lm": {"lm_head.weight": torch.randn(64, 16)}})
        setattr(model.config, name, harmless)


def test_heads_can_be_trained_through() -> None:
    model = classifier()
    with MultiHeadModel(model, None, {"a": {"score.weight": torch.randn(2, 16)}, "b": {}}) as heads:
        heads.heads["a"]["score.weight"].requires_grad_(True)
        heads(**inputs(model))["a"].logits.sum().backward()
        assert heads.heads["a"]["score.weight"].grad.abs().sum() > 0


def test_saved_and_loaded_as_a_unit(tmp_path: Path) -> None:
    model = classifier()
    a, b = adapter(model, LLAMA_LAYER, 1, {"score.weight": (2, 16)}), adapter(model, LLAMA_LAYER, 2, {"score.weight": (1, 16)})
    batch = inputs(model)
    with MultiHeadModel(
        model, merge([a, b]), {"sst2": a.dense, "stsb": b.dense, "old": {}}, {"stsb": "classification"}
    ) as heads:
        heads.save(tmp_path / "unit")
    with (
        MultiHeadModel(model, merge([a, b]), {"sst2": a.dense, "stsb": b.dense}, {"stsb": "classification"}) as heads,
        torch.no_grad(),
    ):
        heads.save(tmp_path / "unit")
        expected = heads(**batch)
    assert sorted(p.name for p in (tmp_path / "unit" / "heads").iterdir()) == ["sst2.safetensors", "stsb.safetensors"]
    with MultiHeadModel.load(tmp_path / "unit", model) as again, torch.no_grad():
        answers = again(**batch)
    assert {t: o.kind for t, o in answers.items()} == {"sst2": "classification", "stsb": "classification"}
    assert all(torch.equal(answers[t].logits, expected[t].logits) for t in ("sst2", "stsb"))
    assert SparseAdapter.load(tmp_path / "unit").nnz == merge([a, b]).nnz


def test_what_outputs_mean_is_kept_and_must_fit(tmp_path: Path) -> None:
    model = classifier()
    heads = {"a": {"score.weight": torch.randn(2, 16)}, "b": {"score.weight": torch.randn(1, 16)}}
    labels = {"a": {"id2label": {"0": "no", "1": "yes"}, "problem_type": "multi_label_classification"}}
    with MultiHeadModel(model, None, heads, labels=labels) as many:
        many.save(tmp_path / "x")
    with MultiHeadModel.load(tmp_path / "x", model) as many:
        assert many.labels == labels | {"b": {}}
        many.save(tmp_path / "y")
    assert (tmp_path / "x/heads.json").read_bytes() == (tmp_path / "y/heads.json").read_bytes()
    for wrong, message in (({"id2label": {"0": "no"}}, "id2label must name each"), ({"problem_type": "x"}, "must be one of regr")):
        with pytest.raises(UserError, match=f"head 'a': .*{message}"):
            MultiHeadModel(model, None, heads, labels={"a": wrong})


@pytest.mark.parametrize(
    "text",
    [
        '{"format_version": 2, "heads": {}}',
        "[" * 99999,
        "{}",
        '{"format_version": 1, "heads": {}}',
        '{"format_version": 1, "heads": {"../x": {}}}',
        '{"format_version": 1, "heads": {"a": {"kind": "classification", "tensors": ["y"]}}}',
        '{"format_version": 1, "heads": {"a": {"kind": "x", "tensors": ["score.weight"]}}}',
        '{"format_version": 1, "heads": {"b": {"kind": "x", "tensors": ["score.weight"]}}}',
    ],
)
def test_damaged_heads_are_refused(tmp_path: Path, text: str) -> None:
    model = classifier()
    with MultiHeadModel(model, None, {"a": {"score.weight": torch.randn(2, 16)}}) as heads:
        heads.save(tmp_path)
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(UserError):
        MultiHeadModel.load(tmp_path, model)


@pytest.mark.parametrize(
    "heads, message",
    [
        ({}, "at least one"),
        ({"../x": {}}, "task's name"),
        ({"a": {"score.bias": torch.ones(2)}}, "no parameter 'score.bias'"),
        ({"a": {"score.weight": torch.ones(2, 15)}}, "must have shape"),
        ({"a": {"model.norm.weight": torch.ones(16)}}, "AdapterBank"),
        ({"a": {"score.weight": torch.ones(2, 16), "model.norm.weight": torch.ones(16)}}, "AdapterBank"),
    ],
)
def test_heads_that_do_not_fit(heads: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiHeadModel(classifier(), None, heads)


def test_a_head_of_another_size_must_be_whole() -> None:
    model = pico.bert()
    with pytest.raises(UserError, match=r"another number of labels and must bring all of classifier\.bias, classifier\.weight"):
        MultiHeadModel(model, None, {"a": {"classifier.weight": torch.ones(5, 16)}})
    with MultiHeadModel(model, None, {"a": {"classifier.weight": torch.ones(3, 16)}}) as heads, torch.no_grad():
        assert heads(**inputs(model))["a"].logits.shape == (2, 3)
    with pytest.raises(UserError, match=r"kind of 'a' must be one of .*, got 'ranking'"):
        MultiHeadModel(model, None, {"a": {}}, {"a": "ranking"})
    with pytest.raises(UserError, match="this model has none that is known"):
        MultiHeadModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), None, {"a": {}})


def test_the_last_token_is_found_by_padding_else_by_mask_else_by_length() -> None:
    hidden = torch.zeros(3, 4, 2)
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 5, 6], [5, 0, 0, 0]])
    assert last_tokens(hidden, {"input_ids": ids}, 0).tolist() == [2, 3, 0]
    assert last_tokens(hidden, {"input_ids": ids, "attention_mask": ids == 5}, 0).tolist() == [2, 3, 0]
    assert last_tokens(hidden, {"input_ids": ids, "attention_mask": ids != 0}, None).tolist() == [2, 3, 0]
    assert last_tokens(hidden, {"attention_mask": (ids != 0).long()}, 0).tolist() == [2, 3, 0]
    assert last_tokens(hidden, {"input_ids": ids}, None).tolist() == [3, 3, 3]


def test_a_closed_model_and_labels_say_so() -> None:
    model = classifier()
    heads = MultiHeadModel(model, adapter(model, LLAMA_LAYER, 1, {}), {"a": {}})
    with pytest.raises(UserError, match="labels"):
        heads(input_ids=torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1))
    heads.close()
    heads.close()
    with pytest.raises(UserError, match="closed"):
        heads(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_heads_of_other_sizes_on_a_model_whose_16_bit_head_is_trained() -> None:
    model = classifier().bfloat16()
    attach(model, SparsityMask({}, {}), train_dense=["score"])
    given: dict[str, Any] = {"a": {"score.weight": torch.randn(2, 16)}, "b": {}, "c": {"score.weight": torch.randn(5, 16)}}
    with MultiHeadModel(model, None, given) as heads, torch.no_grad():
        answers = heads(**inputs(model))
    assert heads.kinds == {"a": "classification", "b": "classification", "c": "classification"}
    assert [answers[task].logits.shape[-1] for task in given] == [2, 3, 5]


def test_a_failing_forward_leaves_the_model_whole() -> None:
    model = classifier()
    own = model.score
    with MultiHeadModel(model, None, {"a": {}}) as heads, pytest.raises(Exception):  # noqa: B017
        heads(input_ids=torch.full((1, 3), 10_000))
    assert model.score is own


def test_a_bank_answers_each_row_by_its_own_adapter() -> None:
    model = classifier(labels=3)
    a = adapter(model, LLAMA_LAYER, 1, {"score.weight": (3, 16)}, slice(0, 30))
    b = adapter(model, LLAMA_LAYER, 2, {"score.weight": (3, 16)}, slice(0, 30))  # every entry conflicts
    batch = inputs(model, rows=6)
    bank = AdapterBank(model, {"a": a, "b": b})
    before = {n: p.clone() for n, p in model.named_parameters()}
    routes = ["a", "b", None, "a", "b", "b"]
    answers = bank(routes, **batch)
    for i, route in enumerate(routes):
        rows = [j for j, r in enumerate(routes) if r == route]
        part = {k: v[rows] for k, v in batch.items()}
        one = {"a": a, "b": b}.get(route or "")
        expected = single(model, one, part) if one else model(**part).logits
        assert torch.equal(answers[i], expected[rows.index(i)])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(UserError, match="no adapter 'c'; it holds a, b"):
        bank(["c"] * 6, **batch)
    bank.switch("a")
    bank(routes, **batch)
    assert bank.active == "a"
    bank.close()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
