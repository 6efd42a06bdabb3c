"""From a row of data to a prompt and the text to learn. One function a template, in the table TEMPLATES.

A rendered example is a list of pieces of text, each either read (prompt) or learnt (answer); pieces are tokenized one
by one, so a prompt has the same tokens in training and in generation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from speft_core.errors import UserError, nearest

Row = Mapping[str, Any]
CALLS = ("tool_calls", "function_call")  # fields of an assistant's turn
UNTOLD = "are not written by the tokenizer's chat template; use a model whose template writes them, or leave the row out"


class EmptyText(UserError):
    """A text of a row is there and holds nothing. Published data sets have a few such rows: they are left out and counted."""

    def __init__(self, role: str, value: str) -> None:
        super().__init__(f"{role} must be text that is not empty; got {value!r}"[:200])
        self.role = role


@dataclass(frozen=True)
class Piece:
    """A stretch of text of an example."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Rendered:
    """An example as text. `special`: the tokenizer's own special tokens are added, as for plain text."""

    pieces: tuple[Piece, ...]
    special: bool = True

    @property
    def prompt(self) -> str:
        """All that comes before the last learnt piece: what the model is given when it must answer."""
        last = max((i for i, piece in enumerate(self.pieces) if piece.learn), default=len(self.pieces))
        return "".join(piece.text for piece in self.pieces[:last])

    @property
    def answer(self) -> str:
        return next((piece.text for piece in reversed(self.pieces) if piece.learn), "")


class ChatTokenizer(Protocol):
    """What the chat template needs of a tokenizer."""

    chat_template: Any
    eos_token: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Template:
    """Roles that a row must and may have, and how they become text."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    render: Callable[[Row, ChatTokenizer, str | None], Rendered]


def columns_of(template: str, columns: Mapping[str, str], available: Sequence[str], source: str) -> dict[str, str]:
    """Role -> column of the data, checked: unknown roles, missing columns."""
    known = TEMPLATES[template]
    roles = known.required + known.optional
    for role in columns:
        if role not in roles:
            message = f"data.columns: template {template} has the roles {', '.join(roles)}; got {role!r}"
            raise UserError(f"{message}.{nearest(role, roles)}".removesuffix("."))
    chosen = {role: columns.get(role, role) for role in roles}
    if template == "chat" and "messages" not in columns and "messages" not in available:
        chosen = _chat_columns(columns, available)
    missing = [
        chosen[r] for r in roles if r in chosen and (r in known.required or r in columns) and chosen[r] not in available
    ]
    if missing:
        listed = ", ".join(available) or "none"
        raise UserError(
            f"{source} must have the column{'s' * (len(missing) > 1)} {', '.join(missing)} for template {template};"
            f" it has {listed} (data.columns maps {', '.join(roles)} to columns)"
        )
    return {role: column for role, column in chosen.items() if column in available}


def _chat_columns(columns: Mapping[str, str], available: Sequence[str]) -> dict[str, str]:
    """A chat of one question and one answer may stand in two columns."""
    question, answer = columns.get("question", "question"), columns.get("answer", "answer")
    if question in available and answer in available:
        return {"question": question, "answer": answer, "tools": columns.get("tools", "tools")}
    return {"messages": "messages", "tools": columns.get("tools", "tools")}


def _question_answer(row: Row, tokenizer: ChatTokenizer, system: str | None) -> Rendered:
    prompt = f"Question: {_text(row, 'question')}\nAnswer:"
    return Rendered((Piece(prompt, False), Piece(" " + _text(row, "answer"), True)))


def _alpaca(row: Row, tokenizer: ChatTokenizer, system: str | None) -> Rendered:
    """The prompt of Stanford Alpaca, word for word."""
    instruction, given = _text(row, "instruction"), row.get("input") or ""
    extra = "" if isinstance(given, str) and not given.strip() else _text(row, "input")
    if extra:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:"
        )
    return Rendered((Piece(prompt, False), Piece(_text(row, "output"), True)))


def _chat(row: Row, tokenizer: ChatTokenizer, system: str | None) -> Rendered:
    """The tokenizer's own chat template; every turn of the assistant is learnt, with the calls of tools in it."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "template chat needs a tokenizer with a chat template; this one has none: use question_answer or alpaca"
        )
    tools = _tools(row)
    messages = _with_objects(tokenizer, _messages(row, system), tools)
    pieces: list[Piece] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            raise UserError(
                "messages must not start with a turn of the assistant, which answers nothing; leave the row out, or set"
                " data.system_prompt where the chat template takes one"
            )
        before = templated(tokenizer, messages[:place], True, tools)
        after = templated(tokenizer, messages[: place + 1], False, tools)
        if tools and not done and templated(tokenizer, messages[:place], True) == before:
            raise UserError(f"tools {UNTOLD}")
        if _calls(message):
            _check_calls(tokenizer, messages[: place + 1], tools, after)
        if not (before.startswith(done) and after.startswith(before)):
            extra = list(dict.fromkeys(name for turn in messages for name in turn if name not in ("role", "content")))
            raise UserError(
                "template chat needs a chat template in which later turns leave earlier ones as they are; this one does not"
                + (f", or not with the turns' {', '.join(extra)}" if extra else "")
            )
        pieces += [Piece(before[len(done) :], False), Piece(after[len(before) :], True)]
        done = after
    last = pieces[-1]
    if tokenizer.eos_token and last.text.rstrip().endswith(tokenizer.eos_token):
        pieces[-1] = Piece(last.text.rstrip(), True)  # nothing is generated after the end of the turn
    return Rendered(tuple(pieces), special=False)


def templated(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Messages as the text of the tokenizer's chat template. UserError with its words where it refuses them.

    A template is a program that comes with the model, so what goes wrong in it can be any exception.
    """
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools or None}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        roles = ", ".join(m["role"] for m in messages[:6]) + (", ..." if len(messages) > 6 else "")
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the tokenizer's chat template refuses turns of {roles}: {said}") from None


def after_turn(tokenizer: ChatTokenizer) -> str:
    """What the chat template writes after the words of an assistant's turn; nothing where it does not take a plain exchange."""
    words = "Yes"
    try:
        text = templated(tokenizer, [{"role": "user", "content": "Ready?"}, {"role": "assistant", "content": words}])
    except UserError:
        return ""
    return text.rpartition(words)[2] if words in text else ""


def _check_calls(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, text: str
) -> None:
    """UserError where the last turn's calls leave no trace in the text: its end would be learnt in their place."""
    bare = {name: value for name, value in messages[-1].items() if name not in CALLS}
    try:
        lost = templated(tokenizer, [*messages[:-1], bare], False, tools) == text
    except UserError:
        return  # without them it is no turn
    if lost:
        raise UserError(f"{' and '.join(_calls(messages[-1]))} {UNTOLD}")


def _multiple_choice(row: Row, tokenizer: ChatTokenizer, system: str | None) -> Rendered:
    """The question, and the right choice as the answer to learn; all choices are scored by their likelihood."""
    return choice_pieces(row, right_choice(row))


def choice_pieces(row: Row, place: int) -> Rendered:
    """The question answered by one of its choices."""
    prompt = f"Question: {_text(row, 'question')}\nAnswer:"
    return Rendered((Piece(prompt, False), Piece(" " + str(row["choices"][place]).strip(), True)))


def right_choice(row: Row) -> int:
    """The place of the right choice, from 0; the answer is a place or a letter."""
    choices, answer = row.get("choices"), row.get("answer")
    if isinstance(choices, str) or not isinstance(choices, Sequence) or len(choices) < 2:
        raise UserError(f"choices must be a list of at least two texts; got {choices!r}"[:200])
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        answer = ord(answer.strip().upper()) - ord("A")
    place = int(answer) if isinstance(answer, int) or (isinstance(answer, str) and answer.strip().isdigit()) else -1
    if not 0 <= place < len(choices):
        raise UserError(f"answer must be the place of a choice from 0 to {len(choices) - 1}, or its letter; got {answer!r}")
    return place


def _messages(row: Row, system: str | None) -> list[dict[str, Any]]:
    """The turns of a row with all that they hold, for the chat template to take what it knows."""
    if "messages" not in row:
        messages: Any = [
            {"role": "user", "content": _text(row, "question")},
            {"role": "assistant", "content": _text(row, "answer")},
        ]
    else:
        messages = row["messages"]
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not all(map(_is_turn, messages)):
            raise UserError("messages must be a list of mappings with the texts role and content (null beside tool_calls)")
        # The Hub's tables give every turn the fields of all, empty where it has none of its own.
        messages = [{name: value for name, value in m.items() if name == "content" or not _is_empty(name, value)} for m in messages]
        answers = [m for m in messages if m["role"] == "assistant"]
        if not answers:
            raise UserError("messages must hold a turn of the assistant; they hold none")
        if not any((m.get("content") or "").strip() or _calls(m) for m in answers):
            raise EmptyText("assistant", answers[-1]["content"])
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return list(messages)


def _is_turn(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(_calls(message)))


def _is_empty(name: str, value: Any) -> bool:
    """A list of no calls is none: templates take any list for calls."""
    return value is None or (name in CALLS and not value)


def _calls(message: Mapping[str, Any]) -> list[str]:
    """The fields in which a turn calls tools: today's, and the one that came before it."""
    return [name for name in CALLS if message.get(name)]


def _with_objects(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The turns with objects where calls hold their arguments as JSON text, as OpenAI writes them: chat templates write objects as
    JSON, and so a text with quotes around it. The turns as they are for a template that takes text alone.
    """
    opened: list[Any] = []
    made = [{name: _opened(value, opened) if name in CALLS else value for name, value in turn.items()} for turn in messages]
    if not opened:
        return messages
    last = max(place for place, turn in enumerate(made) if _calls(turn))
    try:
        text = templated(tokenizer, made[: last + 1], False, tools)
    except UserError:
        return messages
    return messages if any(str(found) in text for found in opened if found) else made  # Python's form of an object is no JSON


def _opened(value: Any, opened: list[Any]) -> Any:
    """A copy of calls with the objects that stand in them as JSON text, which are added to `opened`."""
    if isinstance(value, Mapping):
        return {name: _object(below, opened) if name == "arguments" else _opened(below, opened) for name, below in value.items()}
    return [_opened(call, opened) for call in value] if isinstance(value, (list, tuple)) else value


def _object(value: Any, opened: list[Any]) -> Any:
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return value
    if not isinstance(found, dict):
        return value
    opened.append(found)
    return found


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row offers, as JSON Schemas. Tables hold them as JSON text, since each has other fields."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError:
            pass
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
        raise UserError(f"tools must be a list of JSON Schemas, or one as JSON text; got {row['tools']!r}"[:200])
    return [dict(tool) for tool in tools]


def _text(row: Row, role: str) -> str:
    """The text of a role; numbers are written out. EmptyText for one that is blank, UserError for none and for other types."""
    value = row.get(role)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{role} must be text that is not empty; got {value!r}"[:200])
    if not value.strip():
        raise EmptyText(role, value)
    return value.strip()


TEMPLATES: dict[str, Template] = {
    "question_answer": Template(("question", "answer"), (), _question_answer),
    "alpaca": Template(("instruction", "output"), ("input",), _alpaca),
    "chat": Template(("messages",), ("question", "answer", "tools"), _chat),
    "multiple_choice": Template(("question", "choices", "answer"), (), _multiple_choice),
}
