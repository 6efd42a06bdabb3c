"""Templates, tokens and labels: what is read, what is learnt, where a text starts and ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_tokenizers import byte_level, with_dummy_space
from speft_core import UserError
from speft_train.data.templates import TEMPLATES, EmptyText, Piece, Rendered, columns_of
from speft_train.data.tokens import IGNORED, TokenDataset, encode, prompt_ids, tokenize

PLAIN = byte_level()
QA = {"question": "How many?", "answer": "2+2=4\n#### 4"}


def render(template: str, row: dict[str, Any], tokenizer: Any = PLAIN, system: str | None = None) -> Rendered:
    return TEMPLATES[template].render(row, tokenizer, system)


def learnt_text(example: Rendered, tokenizer: Any = PLAIN) -> str:
    ids, learnt = encode(example, tokenizer)
    return str(tokenizer.decode([token for token, mark in zip(ids, learnt, strict=True) if mark]))


def test_question_answer() -> None:
    example = render("question_answer", QA)
    assert example.prompt == "Question: How many?\nAnswer:"
    assert learnt_text(example) == " 2+2=4\n#### 4</s>"


def test_alpaca_is_the_published_prompt_with_and_without_input() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    with_input, without = render("alpaca", row), render("alpaca", {**row, "input": ""})
    assert "paired with an input that provides further context" in with_input.prompt
    assert with_input.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:")
    assert "paired with" not in without.prompt
    assert without.prompt.endswith("describes a task. Write a response that appropriately completes the request.\n\n"
                                   "### Instruction:\nAdd.\n\n### Response:")  # fmt: skip
    assert render("alpaca", {"instruction": "Add.", "output": "4"}) == without
    assert render("alpaca", {**row, "input": " \n"}) == without
    assert learnt_text(with_input) == "4</s>"


def test_chat_learns_every_turn_of_the_assistant_and_nothing_else() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = render("chat", row)
    whole = PLAIN.apply_chat_template(row["messages"], tokenize=False)
    assert "".join(piece.text for piece in example.pieces) == whole.rstrip()
    assert [piece.text for piece in example.pieces if piece.learn] == ["Hello</s>\n", "4</s>"]
    assert example.prompt == whole[: whole.index("4</s>")]
    ids, learnt = encode(example, PLAIN)
    assert ids == PLAIN(whole.rstrip(), add_special_tokens=False)["input_ids"], "no start or end token twice"
    assert ids[-1] == PLAIN.eos_token_id and learnt[-1]


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]}


def test_what_a_chat_template_refuses_is_told_in_its_words() -> None:
    """As Gemma's and Mistral's do."""
    strict = byte_level()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] + '\n' }}{% endfor %}"
    )
    assert render("chat", turns("user", "assistant"), strict).answer == "assistant 1\n"
    with pytest.raises(UserError, match="chat template refuses turns of system, user: System role not supported"):
        render("chat", turns("user", "assistant"), strict, system="Be brief.")
    with pytest.raises(UserError, match="chat template refuses turns of user, user: Roles must alternate"):
        render("chat", turns("user", "user", "assistant"), strict)
    strict.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(UserError, match="chat template refuses turns of user: can only concatenate str"):
        render("chat", turns("user", "assistant"), strict)


def test_a_conversation_does_not_start_with_its_answer() -> None:
    with pytest.raises(UserError, match="must not start with a turn of the assistant"):
        render("chat", turns("assistant", "user", "assistant"))
    assert render("chat", turns("assistant", "user", "assistant"), system="Greet.").prompt.startswith("<u>system: Greet.")


def test_a_conversation_without_a_word_of_the_assistant_is_empty() -> None:
    row = turns("user", "assistant", "user", "assistant")
    row["messages"][1]["content"] = ""
    assert [piece.text for piece in render("chat", row).pieces if piece.learn] == ["</s>\n", "assistant 3</s>"]
    row["messages"][3]["content"] = " "
    with pytest.raises(EmptyText) as caught:
        render("chat", row)
    assert caught.value.role == "assistant"


def test_chat_of_two_columns_and_a_system_prompt() -> None:
    example = render("chat", QA, system="Be brief.")
    assert example.prompt == "<u>system: Be brief.</s>\n<u>user: How many?</s>\n<u>assistant: "
    own = {
        "messages": [
            {"role": "system", "content": "own"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert "Be brief" not in render("chat", own, system="Be brief.").prompt


def test_chat_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        render("chat", QA, byte_level(chat=False))
    shifting = byte_level()
    shifting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="later turns leave earlier ones as they are"):
        render("chat", QA, shifting)
    for messages in ("hi", [{"role": "user"}], [{"role": "user", "content": "a"}], []):
        with pytest.raises(UserError, match="messages must"):
            render("chat", {"messages": messages})


@pytest.mark.parametrize("value", ["", "  ", None, ["a"], True])
def test_empty_or_strange_text_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="answer must be text that is not empty"):
        render("question_answer", {"question": "a", "answer": value})


def test_numbers_are_written_out() -> None:
    assert learnt_text(render("question_answer", {"question": "2+2?", "answer": 4})) == " 4</s>"


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_one_start_token_if_the_tokenizer_wants_one_and_one_end_token_always(start: bool, end: bool) -> None:
    tokenizer = byte_level(start=start, end=end)
    ids, learnt = encode(render("question_answer", QA), tokenizer)
    assert ids.count(tokenizer.bos_token_id) == int(start)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert (ids[0] == tokenizer.bos_token_id) == start
    assert ids[-1] == tokenizer.eos_token_id and learnt[-1]


def test_start_and_end_token_may_be_the_same() -> None:
    tokenizer = byte_level(start=True, bos_token="<s>", eos_token="<s>", pad_token=None)
    ids, _ = encode(render("question_answer", QA), tokenizer)
    assert ids[0] == ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2


def test_no_end_token_where_the_tokenizer_has_none() -> None:
    tokenizer = byte_level(eos_token=None)
    assert learnt_text(render("question_answer", QA), tokenizer) == " 2+2=4\n#### 4"


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), byte_level(start=True, end=True), with_dummy_space()], ids=["plain", "ends", "dummy"]
)
@pytest.mark.parametrize("template", ["question_answer", "chat"])
def test_the_prompt_has_the_same_tokens_in_training_and_generation(tokenizer: Any, template: str) -> None:
    if template == "chat" and not tokenizer.chat_template:
        tokenizer.chat_template = byte_level().chat_template
    example = render(template, QA, tokenizer)
    prompt = prompt_ids(example, tokenizer)
    ids, learnt = encode(example, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert not any(learnt[: len(prompt)]) and all(learnt[len(prompt) :])


def test_no_space_is_put_between_prompt_and_answer() -> None:
    tokenizer = with_dummy_space()
    example = Rendered((Piece("ab:", False), Piece("cd", True)))
    ids, _ = encode(example, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "a", "b", ":", "c", "d", "</s>"]


def test_prompt_loss_learns_everything() -> None:
    ids, learnt = encode(render("question_answer", QA), PLAIN, prompt_loss=True)
    assert all(learnt) and len(ids) == len(learnt)


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_labels_are_exactly_the_answer_and_its_end(question: str, answer: str) -> None:
    try:
        example = render("question_answer", {"question": question, "answer": answer})
    except UserError:
        pytest.fail("text that is not blank is usable")
    dataset, _ = tokenize([example], PLAIN, max_length=10_000, overlong="drop")
    row = dataset[0]
    kept = [label for label in row["labels"] if label != IGNORED]
    assert kept == PLAIN(" " + answer.strip(), add_special_tokens=False)["input_ids"] + [PLAIN.eos_token_id]
    assert row["input_ids"][-len(kept) :] == kept
    assert len(row["input_ids"]) == len(row["labels"])


def examples(lengths: list[tuple[int, int]]) -> list[Rendered]:
    return [Rendered((Piece("p" * prompt, False), Piece("a" * answer, True))) for prompt, answer in lengths]


def test_overlong_examples_are_dropped_and_counted() -> None:
    dataset, report = tokenize(examples([(3, 3), (5, 5), (3, 6)]), PLAIN, max_length=10, overlong="drop")
    assert dataset.lengths == [7, 10]
    assert (report.rows, report.used, report.dropped, report.truncated) == (3, 2, 1, 0)
    assert (report.tokens, report.learnt_tokens, report.longest) == (17, 11, 10)
    assert "1 dropped, longer than 10 tokens" in report.sentence("train", 10)


def test_overlong_examples_are_cut_and_counted_unless_no_answer_is_left() -> None:
    dataset, report = tokenize(examples([(3, 3), (5, 9), (12, 3)]), PLAIN, max_length=10, overlong="truncate")
    assert dataset.lengths == [7, 10]
    assert (report.dropped, report.truncated) == (1, 1)
    assert dataset[1]["labels"][-1] != PLAIN.eos_token_id, "a cut answer does not end"
    assert "1 cut to 10 tokens" in report.sentence("train", 10)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6), max_size=6))
def test_token_dataset_gives_back_what_it_was_given(rows: list[list[tuple[int, bool]]]) -> None:
    dataset = TokenDataset([[token for token, _ in row] for row in rows], [[mark for _, mark in row] for row in rows])
    assert len(dataset) == len(rows)
    for row, example in zip(rows, dataset, strict=True):
        assert example["input_ids"] == [token for token, _ in row]
        assert example["labels"] == [token if mark else IGNORED for token, mark in row]
    assert dataset.lengths == list(map(len, rows))
    backwards = dataset.select(range(len(rows) - 1, -1, -1))
    assert [backwards[i] for i in range(len(rows))] == [dataset[i] for i in range(len(rows) - 1, -1, -1)]
    with pytest.raises(IndexError):
        dataset[len(rows)]


def test_columns_are_mapped_and_checked() -> None:
    assert columns_of("alpaca", {}, ["instruction", "input", "output", "text"], "d") == {
        "instruction": "instruction", "output": "output", "input": "input"
    }  # fmt: skip
    assert columns_of("question_answer", {"question": "q"}, ["q", "answer"], "d") == {"question": "q", "answer": "answer"}
    assert columns_of("chat", {}, ["question", "answer"], "d") == {"question": "question", "answer": "answer"}
    assert columns_of("chat", {"messages": "turns"}, ["turns"], "d") == {"messages": "turns"}


@pytest.mark.parametrize(
    ("template", "columns", "available", "part"),
    [
        (
            "question_answer",
            {},
            ["q", "a"],
            "d must have the columns question, answer for template question_answer; it has q, a",
        ),
        ("question_answer", {"question": "x"}, ["q", "answer"], "d must have the column x"),
        ("question_answer", {"quest": "q"}, ["q"], "has the roles question, answer; got 'quest'. Did you mean 'question'?"),
        ("alpaca", {"input": "ctx"}, ["instruction", "output"], "d must have the column ctx"),
        ("chat", {}, ["text"], "d must have the column messages"),
    ],
)
def test_wrong_columns(template: str, columns: dict[str, str], available: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        columns_of(template, columns, available, "d")
    assert part in str(caught.value)
