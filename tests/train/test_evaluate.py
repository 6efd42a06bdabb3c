"""Generation, exact match and loss, on the model as it stands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pico
from pico_tokenizers import byte_level
from speft_core import UserError
from speft_train.config import RunConfig, from_mapping
from speft_train.data.collate import Collator
from speft_train.data.templates import TEMPLATES
from speft_train.data.tokens import TokenDataset
from speft_train.evaluate import batches, generate_exact_match, generate_greedy, held_out_loss
from speft_train.evaluate.generate import end_ids
from speft_train.evaluate.numbers import last_number, normal, reference_number, strict_number


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("2+2=4\n#### 4", "4", "4"),
        ("#### 1,234.50", "1234.5", "1234.5"),
        ("#### $12.00", "12", "12"),
        ("####7", "7", "7"),
        ("#### -3", "-3", "-3"),
        ("#### −3", "-3", "-3"),
        ("#### -$3", "-3", "-3"),
        ("#### $-3", "-3", "-3"),
        ("#### .5", "0.5", "0.5"),
        ("#### -0.0", "0", "0"),
        ("#### 007", "7", "7"),
        ("#### 12 apples", "12", "12"),
        ("#### 5\n#### 6", "5", "6"),
        ("#### five, or 6", None, "6"),
        ("The answer is 42.", None, "42"),
        ("40 - 5", None, "5"),
        ("3-5", None, "5"),
        ("= -5", None, "-5"),
        ("10%", None, "10"),
        ("in 1,2,3", None, "3"),
        ("1,234,567 of them", None, "1234567"),
        ("no number", None, None),
        ("####", None, None),
        ("", None, None),
    ],
)
def test_numbers_in_answers(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_number(text) == strict
    assert last_number(text) == flexible


def test_reference_is_the_marked_number_or_the_last() -> None:
    assert reference_number("3 and 4\n#### 7") == "7"
    assert reference_number("3 and 4") == "4"
    assert reference_number("10 ####") is None, "a marker without a number is no reference"


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_one_form_for_every_way_to_write_a_number(value: Any) -> None:
    forms = {normal(f"{value:f}"), normal(f"{value:,f}"), normal(f"{value:f}0"), normal(f"${value:f}"), normal(f" {value:f}")}
    assert len(forms) == 1
    text = forms.pop()
    assert text is not None and float(text) == float(value)
    assert strict_number(f"so\n#### {value:,f}") == text
    assert last_number(f"that is {value:,f}") == text


@given(st.text())
def test_no_text_breaks_the_search(text: str) -> None:
    for found in (strict_number(text), strict_number("#### " + text), last_number(text)):
        assert found is None or math.isfinite(float(found))


def naive(model: Any, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    """One prompt, no cache, no padding."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


class Letters:
    """A tokenizer that shows ids as they are."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = []
        for token in ids:
            if token == 2:
                break
            kept.append(token)
        return " ".join(map(str, kept))


@pytest.mark.parametrize("make", [pico.llama, pico.opt, pico.gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_generation_equals_one_prompt_at_a_time(make: Any, batch_size: int) -> None:
    model = make()
    prompts = [[5], [6, 7, 8, 9], [10, 11], [5, 5, 5, 5, 5, 5], [12, 13, 14]]
    with torch.no_grad():
        expected = [naive(model, prompt, 6, {2}) for prompt in prompts]
    found = generate_greedy(
        model,
        Letters(),
        prompts,
        max_new_tokens=6,
        batch_size=batch_size,
        progress=False,  # type: ignore[arg-type]
    )
    assert found == [Letters().decode(ids) for ids in expected]
    assert len(set(found)) > 1, "the pico model must not answer all alike"


def test_generation_stops_at_every_end_token_and_not_before() -> None:
    """With an end token that the model does produce, the batch goes on for the others and that answer stays cut."""
    model = pico.llama()
    prompts = [[5], [6, 7, 8, 9], [10, 11]]
    with torch.no_grad():
        free = [naive(model, prompt, 8, set()) for prompt in prompts]
    end = free[0][2]
    model.generation_config.eos_token_id = [end, 63]
    assert end_ids(model, Letters()) == sorted({2, end, 63})  # type: ignore[arg-type]
    with torch.no_grad():
        expected = [naive(model, prompt, 8, {2, end, 63}) for prompt in prompts]
    found = generate_greedy(model, Letters(), prompts, max_new_tokens=8, batch_size=3, progress=False)  # type: ignore[arg-type]
    cut = [[int(token) for token in answer.split()] for answer in found]
    for answer, wanted in zip(cut, expected, strict=True):
        assert answer[: len(wanted)] == [token for token in wanted if token != 2]
        assert set(answer[len(wanted) :]) <= {0}, "only padding after the end"


def test_generation_leaves_the_model_as_it_was() -> None:
    model = pico.llama()
    model.train()
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    own = model.generation_config
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate_greedy(model, Letters(), [[5, 6]], max_new_tokens=3, batch_size=1, progress=False)  # type: ignore[arg-type]
    assert model.training and model.config.use_cache is False and model.generation_config is own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def config(**evaluate: Any) -> RunConfig:
    return from_mapping(
        {"output_dir": "o", "model": {"name": "m"}, "adapter": {"budget": {"k": 1}}, "data": {"train": "rows"},
         "evaluate": evaluate}
    )  # fmt: skip


def exact_match(monkeypatch: pytest.MonkeyPatch, answers: list[str], rows: list[dict[str, str]], **evaluate: Any) -> Any:
    """Exact match of given answers: what the model says is not this function's business."""
    from speft_train.evaluate import exact_match as module

    def answered(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[str]:
        assert [tokenizer.decode(prompt) for prompt in prompts] == [f"Question: {r['question']}\nAnswer:" for r in rows][
            : len(prompts)
        ]
        return answers[: len(prompts)]

    monkeypatch.setattr(module, "generate_greedy", answered)
    examples = [TEMPLATES["question_answer"].render(row, byte_level(), None) for row in rows]
    return generate_exact_match(None, byte_level(), examples, config(**evaluate))  # type: ignore[arg-type]


def test_exact_match_strict_and_flexible(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"q{i}", "answer": f"work\n#### {i}"} for i in range(4)]
    answers = ["#### 0", "it is 1", "#### 9 no 2", "#### 9"]
    found = exact_match(monkeypatch, answers, rows, examples=3)
    assert (found["exact_match"], found["exact_match_last_number"], found["count"]) == (0.25, 0.75, 4)
    assert found["seconds"] >= 0
    assert [example["correct"] for example in found["examples"]] == [False, False, False], "wrong ones first"
    assert found["examples"][0] == {
        "prompt": "Question: q1\nAnswer:", "expected": "work\n#### 1", "generated": "it is 1", "correct": False
    }  # fmt: skip
    assert exact_match(monkeypatch, answers, rows, limit=1)["exact_match"] == 1.0


def test_exact_match_needs_rows_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs at least one test row"):
        exact_match(monkeypatch, [], [])
    with pytest.raises(UserError, match="'x' has none"):
        exact_match(monkeypatch, ["", ""], [{"question": "a", "answer": "1"}, {"question": "b", "answer": "x"}])


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_held_out_loss_is_the_mean_over_learnt_tokens_whatever_the_batches(trim: bool, batch_size: int) -> None:
    model = pico.llama()
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19]]
    learnt = [[False, True, True, True], [False, True], [False] * 5 + [True], [False] * 3]
    total, count = 0.0, 0
    for row, marks in zip(ids, learnt, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for place in range(1, len(row)):
            if marks[place]:
                total -= float(scores[place - 1, row[place]])
                count += 1
    model.train()
    found = held_out_loss(model, TokenDataset(ids, learnt), Collator(0, trim_logits=trim), batch_size, progress=False)
    assert found["tokens"] == count == 5
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert model.training


@given(lengths=st.lists(st.integers(0, 50), max_size=40), batch_size=st.integers(1, 9), limit=st.integers(1, 4000))
def test_batches_hold_every_example_once_and_no_more_logits_than_there_is_room_for(
    lengths: list[int], batch_size: int, limit: int
) -> None:
    model = pico.llama(vocab_size=11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "LOGITS", limit)
        found = list(batches.batches(model, lengths, batch_size))
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    assert all(len(places) <= batch_size for places in found)
    padded = [len(places) * max(lengths[place] for place in places) for places in found]
    assert all(len(places) == 1 or tokens * 11 <= limit for places, tokens in zip(found, padded, strict=True))
    rest = [lengths[place] for places in found for place in places]
    assert rest == sorted(lengths, reverse=True)
    for places, tokens in zip(found[:-1], padded, strict=False):  # no smaller than need be
        assert len(places) == batch_size or (tokens + tokens // len(places)) * 11 > limit


def test_a_loss_over_many_logits_is_that_of_one_example_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama()
    dataset = TokenDataset([list(range(3, 3 + n)) for n in (5, 9, 2, 7)], [[True] * n for n in (5, 9, 2, 7)])
    whole = held_out_loss(model, dataset, Collator(0), 4, progress=False)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(batches, "LOGITS", 1)
    split = held_out_loss(model, dataset, Collator(0), 4, progress=False)
    assert seen == [1, 1, 1, 1] and split["tokens"] == whole["tokens"] == 19
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_held_out_loss_of_nothing_is_not_a_number_and_says_so_by_its_count() -> None:
    found = held_out_loss(pico.llama(), TokenDataset([[5, 6]], [[False, False]]), Collator(0), 2, progress=False)
    assert found["tokens"] == 0 and math.isnan(found["loss"])
