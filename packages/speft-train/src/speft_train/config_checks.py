"""Checks of a config tree against the dataclasses of config.py. Each returns its mistakes as text and raises nothing.

A field's metadata may hold: required, choices (or_pattern, or_words: what else is allowed), pattern and its words,
minimum, maximum, above, below, each (choices of a list's items), nonempty. `added` marks a key that came later: at its
default it does not count in the hashes of a run, so that finished runs stay finished.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any

from speft_core.errors import nearest

from .train_args import check_train

KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list of texts",
    dict: "a mapping",
    type(None): "null",
}


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A field with one line of documentation and the rules that its value must keep."""
    metadata = {"doc": doc, **rules}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_tree(cls: Any, tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Unknown keys, wrong types, values out of range and missing required keys below a dataclass."""
    mistakes = []
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key not in known:
            mistakes.append(f"{path}: unknown key.{_nearest_or_list(str(key), list(known))}")
        elif is_dataclass(hints[key]):
            if value is None or isinstance(value, Mapping):
                mistakes += check_tree(hints[key], value or {}, f"{path}.")
            else:
                mistakes.append(f"{path}: must be a mapping; got {value!r}")
        elif not fits(value, hints[key]):
            mistakes.append(f"{path}: must be {describe(hints[key])}; got {value!r}")
        elif path == "train":
            mistakes += check_train(value)
        elif value is not None:
            mistakes += [f"{path}: {rule}; got {value!r}.{hint}" for rule, hint in broken_rules(value, known[key].metadata)]
    for name, f in known.items():
        if f.metadata.get("required") and name not in tree:
            mistakes.append(f"{prefix}{name}: is required ({f.metadata['doc']})")
        elif name not in tree and is_dataclass(hints[name]):
            mistakes += check_tree(hints[name], {}, f"{prefix}{name}.")
    return [mistake.removesuffix(".") for mistake in mistakes]


def broken_rules(value: Any, rules: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(rule, hint) of each rule that the value breaks."""
    broken = []
    if rules.get("required") and not value:
        broken.append(("must not be empty", ""))
    choices = rules.get("choices")
    if choices is not None and not _is_choice(value, choices, rules.get("or_pattern")):
        allowed = ", ".join(map(_show, choices)) + (f" or {rules['or_words']}" if "or_words" in rules else "")
        broken.append((f"must be one of {allowed}", nearest(str(value), [str(c) for c in choices])))
    if "pattern" in rules and isinstance(value, str) and not re.fullmatch(rules["pattern"], value):
        return [(f"must be {rules['words']}", "")]
    for item in value if isinstance(value, list) else []:
        if rules.get("each") is not None and item not in rules["each"]:
            broken.append((f"each must be one of {', '.join(rules['each'])}", nearest(str(item), list(rules["each"]))))
    if rules.get("nonempty") and not value:
        broken.append(("must not be empty", ""))
    limits = (
        ("minimum", "at least", lambda limit: value >= limit),
        ("maximum", "at most", lambda limit: value <= limit),
        ("above", "more than", lambda limit: value > limit),
        ("below", "less than", lambda limit: value < limit),
    )
    for rule, words, holds in limits:
        if rule in rules and not isinstance(value, str) and not holds(rules[rule]):
            broken.append((f"must be {words} {rules[rule]}", ""))
    return broken


def _is_choice(value: Any, choices: Any, pattern: str | None) -> bool:
    if pattern is not None and re.fullmatch(pattern, str(value)):
        return True
    return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of a type; whole numbers are numbers, true and false are not."""
    if hint is Any:
        return True
    args = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(k, str) and fits(v, args[1]) for k, v in value.items())
    if args:
        return any(fits(value, arg) for arg in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, dict):
        return KIND_NAMES[origin]
    if args:
        return " or ".join(describe(arg) for arg in args)
    return KIND_NAMES.get(hint, str(hint))


def _show(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _nearest_or_list(name: str, known: list[str]) -> str:
    return nearest(name, known) or f" Known here: {', '.join(known)}"


def unread(task: str, template: str) -> list[str]:
    """Keys of the data that a run of this task and template never reads. Earlier versions took them."""
    return ["system_prompt"] * (template != "chat") + ["instruction"] * (task != "sequence_classification")


def check_read(task: str, data: Mapping[str, Any]) -> list[str]:
    """Settings of the data that a run of this task and template would never read."""
    classifies, template = task == "sequence_classification", data.get("template", "question_answer")
    mistakes, idle = [], unread(task, template)
    if data.get("system_prompt") and "system_prompt" in idle:
        mistakes.append(f"data.system_prompt: is for data.template chat; the template is {template}")
    if data.get("instruction") is not None and "instruction" in idle:
        mistakes.append(f"data.instruction: is for model.task sequence_classification; the task is {task}")
    if classifies and template == "chat" and data.get("instruction") is None:
        mistakes.append("data.template: chat needs data.instruction in a classification, which becomes the user's turn; none is set")
    return mistakes
