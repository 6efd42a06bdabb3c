"""Chats with calls of tools, and where a turn ends: the chat template says both."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pico
from pico_tokenizers import byte_level
from speft_core import UserError
from speft_train.config import from_mapping
from speft_train.data.templates import TEMPLATES, EmptyText, Rendered
from speft_train.data.tokens import encode, prompt_ids
from speft_train.evaluate import generate_exact_match
from speft_train.evaluate.generate import turn_end

# As Qwen2's: turns end in a token of their own, which is not the tokenizer's end of text; calls and tools are written as JSON.
TOOLS = (
    "{% if tools %}<u>tools: {{ tools | tojson }}<end>\n{% endif %}"
    "{% for m in messages %}<u>{{ m.role }}: {% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant: {% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "unit": None}}}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tokenizer(template: str = TOOLS) -> PreTrainedTokenizerFast:
    made = byte_level()
    made.add_special_tokens({"additional_special_tokens": ["<u>", "<end>"]})
    made.chat_template = template
    return made


def row(**last: Any) -> dict[str, Any]:
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}, {"role": "assistant", **last}]
    return {"messages": [*asked, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]}


def render(row: dict[str, Any], template: str = TOOLS) -> Rendered:
    return TEMPLATES["chat"].render(row, tokenizer(template), None)


def learnt(example: Rendered) -> list[str]:
    return [piece.text for piece in example.pieces if piece.learn]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "absent"])
def test_a_turn_that_calls_a_tool_is_learnt_as_the_template_writes_it(content: dict[str, Any]) -> None:
    """Whole messages are handed over, but for fields that a table fills with nothing."""
    given = row(**content, tool_calls=[CALL], function_call=None, name=None)
    given["messages"][0]["tool_calls"] = None
    text = f'<call>{json.dumps(CALL["function"])}</call><end>\n'
    assert learnt(render(given)) == [text, "Sunny.<end>\n"]
    alone = {"messages": given["messages"][:2]}
    assert learnt(render(alone)) == [text], "a conversation that ends in a call is no empty one"


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])], ids=["list", "text"])
def test_tools_of_a_row_stand_in_its_prompt(tools: Any) -> None:
    assert render({**row(content="One moment."), "tools": tools}).prompt.startswith(f"<u>tools: {json.dumps([SCHEMA])}<end>\n")
    pair = {"question": "Weather?", "answer": "Sunny.", "tools": tools}
    assert render(pair).prompt.startswith("<u>tools: ")


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    given = row(content="One moment.")
    assert render({**given, "tools": tools}) == render(given)


@pytest.mark.parametrize("template", [TOOLS.replace("m.tool_calls or []", "[]"), byte_level().chat_template], ids=["json", "plain"])
@pytest.mark.parametrize("content", [None, "", "I look."])
def test_calls_that_the_template_leaves_out_are_refused(template: str, content: str | None) -> None:
    """Learnt would be a turn that ends where it should call; the plain one writes "None" for null."""
    with pytest.raises(UserError, match=r"tool_calls are not written by the tokenizer's chat template; use a model whose"):
        render(row(content=content, tool_calls=[CALL]), template)


def test_what_no_template_here_writes_is_refused() -> None:
    with pytest.raises(UserError, match="function_call are not written"):
        render(row(content="", function_call={"name": "weather", "arguments": "{}"}))
    with pytest.raises(UserError, match="tools are not written"):
        render({**row(content="I look."), "tools": [SCHEMA]}, byte_level().chat_template)
    for tools in ("a hammer", {"name": "weather"}, ["weather"], 3):
        with pytest.raises(UserError, match="tools must be a list of JSON Schemas, or one as JSON text; got"):
            render({**row(content="I look."), "tools": tools})


def test_null_is_content_beside_calls_alone() -> None:
    for wrong in ({"content": None}, {"content": None, "tool_calls": []}, {}, {"content": ["I look."], "tool_calls": [CALL]}):
        with pytest.raises(UserError, match="messages must be a list of mappings with the texts role and content"):
            render(row(**wrong))
    with pytest.raises(EmptyText):
        render({"messages": row(content=" ", tool_calls=[])["messages"][:2]})


def test_an_empty_list_of_calls_is_no_call() -> None:
    """Llama 3's templates take any list for calls, and refuse one that has not exactly one."""
    template = "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls|length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    template += "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    given = row(content="One moment.")
    filled = {"messages": [{**turn, "tool_calls": [], "function_call": {}} for turn in given["messages"]]}
    assert render(filled, template) == render(given, template)


OLDER = TOOLS.replace("m.tool_calls or []", "([m] if m.function_call else [])").replace("call.function ", "call.function_call ")
OPENAI: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern", "unit": null}'}}


@pytest.mark.parametrize(
    ("calls", "template"),
    [
        ({"tool_calls": [OPENAI]}, TOOLS),
        ({"tool_calls": [OPENAI["function"]]}, TOOLS.replace("call.function", "call")),
        ({"function_call": OPENAI["function"]}, OLDER),
    ],
    ids=["tool_calls", "bare", "function_call"],
)
def test_arguments_that_are_json_text_are_learnt_as_the_object_that_they_are(calls: dict[str, Any], template: str) -> None:
    given = row(content=None, **calls)
    before = json.dumps(given)
    assert learnt(render(given, template))[0] == f'<call>{json.dumps(CALL["function"])}</call><end>\n'
    assert json.dumps(given) == before, "the row is another's"


@pytest.mark.parametrize("write", ["'' + a", "a", "a if a is string else a | tojson"], ids=["joined", "written", "either"])
def test_a_template_that_takes_arguments_as_text_gets_the_text(write: str) -> None:
    """As DeepSeek's, which joins it to other text."""
    template = TOOLS.replace("{{ call.function | tojson", "{% set a = call.function.arguments %}{{ " + write)
    assert learnt(render(row(content=None, tool_calls=[OPENAI]), template))[0] == f"<call>{OPENAI['function']['arguments']}</call><end>\n"


@pytest.mark.parametrize("text", ["Bern", '"Bern"', "[1]", "{", ""])
def test_arguments_that_are_no_json_object_stay_as_they_are(text: str) -> None:
    call = {"function": {"name": "weather", "arguments": text}}
    assert learnt(render(row(content=None, tool_calls=[call])))[0] == f"<call>{json.dumps(call['function'])}</call><end>\n"


def test_fields_that_a_template_rewrites_in_earlier_turns_are_named() -> None:
    """As Qwen3's, which leaves the reasoning of earlier turns out."""
    thought = "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    template = TOOLS.replace("{{ m.role }}: ", "{{ m.role }}: " + thought)
    given = row(content="I look.", reasoning_content="The sky?")
    given["messages"][-1]["reasoning_content"] = "Sun."
    rule = "later turns leave earlier ones as they are; this one does not"
    with pytest.raises(UserError, match=f"{rule}, or not with the turns' reasoning_content$"):
        render(given, template)
    with pytest.raises(UserError, match=f"{rule}$"):
        render(row(content="I look."), "{{ messages|length }}{{ messages[-1].content }}")


def chain(end: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model that answers 4, closes its turn, and would go on with nines: each token has its one successor."""
    made = tokenizer()
    size = len(made)
    model = pico.llama(vocab_size=size, hidden_size=size + -size % 4, tied=False, num_hidden_layers=1)
    after = {" ": "4", "4": end, end: "9", "9": "9"}

    def id_of(text: str) -> int:
        (found,) = made(text, add_special_tokens=False)["input_ids"]
        return int(found)

    with torch.no_grad():
        for weights in (*model.model.layers.parameters(), model.lm_head.weight):
            weights.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        for before, then in after.items():
            model.lm_head.weight[id_of(then), id_of(before)] = 1.0
    return model, made


def test_an_answer_ends_with_the_turn_and_nothing_after_it_counts() -> None:
    model, made = chain("<end>")
    assert made.eos_token == "</s>" and turn_end(made) == made.convert_tokens_to_ids("<end>") != made.eos_token_id
    example = TEMPLATES["chat"].render({"question": "2+2?", "answer": "4"}, made, None)
    ids, marks = encode(example, made)
    assert [token for token, mark in zip(ids, marks, strict=True) if mark][1] == turn_end(made), "it is learnt"
    cfg = from_mapping(
        {"output_dir": "o", "model": {"name": "m"}, "adapter": {"budget": {"k": 1}}, "data": {"train": "d", "template": "chat"},
         "evaluate": {"max_new_tokens": 12}}
    )  # fmt: skip
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    found = generate_exact_match(model, made, [example], cfg, progress=False)
    assert found["examples"][0]["generated"] == "4" and found["exact_match_last_number"] == 1.0
    assert len(steps) == 2, "the answer and its end"
    assert prompt_ids(example, made) == ids[: len(ids) - sum(marks)]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TOOLS, "<end>"),
        (byte_level().chat_template, "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}<u>{{ m.role }}\n{% endfor %}", None),
    ],
    ids=["own", "eos", "text", "refused", "mute"],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_it(template: str, end: str | None) -> None:
    made = tokenizer(template)
    assert turn_end(made) == (None if end is None else made.convert_tokens_to_ids(end))
