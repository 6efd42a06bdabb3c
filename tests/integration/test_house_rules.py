"""What keeps the tree readable: short files and functions, no code and no option that nothing uses, one word for a thing."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from integration.pages import PAGES, ROOT

FOLDERS = ("packages", "benchmarks", "tools", "tests")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if "build" not in p.parts)
SOURCES = [p for p in FILES if p.relative_to(ROOT).parts[0] != "tests"]
LONGEST_FILE, LONGEST_FUNCTION = 350, 60

# Used though no other place of the sources or pages names them, with the reason.
USED = {
    "weight_gradient_entries": "the oracle that tests compare every plan with",
    "all_cells": "the valid runs of every table, for a test",
    "train_rows": "what a test of loading looks at",
    "__signature__": "read by Typer",
    "label2id": "read by transformers",
    "pad_token": "read by transformers",
    "module_state_dict": "called by DeepSpeed",
    "init_lora_weights": "written into PEFT's own configuration",
    "inference_mode": "written into PEFT's own configuration",
    "should_training_stop": "read by the Trainer",
    "_attn_implementation": "read by transformers",
}
CALLED_BY_LIBRARIES = re.compile(r"on_[a-z_]+|visit_\w+|_get_train_sampler|save_model|_load_best_model|__\w+__|_")


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    """Every node of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in parsed(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_no_file_is_too_long() -> None:
    """Above 350 lines a file wants splitting by subject."""
    assert len(FILES) > 150
    assert [str(p.relative_to(ROOT)) for p in FILES if len(p.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE] == []


def test_no_function_is_too_long() -> None:
    """Above 60 lines from its first statement to its last, documentation aside, a function wants parts with names."""
    lengths = {}
    for path in FILES:
        for function in functions(path):
            documented = ast.get_docstring(function) is not None and len(function.body) > 1
            first = function.body[1 if documented else 0]
            lengths[f"{path.relative_to(ROOT)}: {function.name}"] = (function.end_lineno or 0) - first.lineno + 1
    assert len(lengths) > 1500
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def words_outside_tests() -> Counter[str]:
    """How often each word stands in sources, task files, build files and pages."""
    found: Counter[str] = Counter()
    for path in [*SOURCES, *(ROOT / "packages").rglob("*.yaml"), *(ROOT / "packages").rglob("*.toml"), *PAGES]:
        if path.name != "README.md" or path.parent != ROOT:  # its tree repeats the sources
            found.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return found


def test_no_code_is_dead() -> None:
    """A function, class, method or constant is named at least once besides where it is made; docs/api.md names the public ones."""
    used = words_outside_tests()
    unused = []
    for path in SOURCES:
        for node in parsed(path):
            made: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not (node.decorator_list and _registers(node)):
                made = [node.name]
            elif isinstance(node, ast.Module):
                made = [t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
            unused += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in made
                if used[name] < 2 and name not in USED and not CALLED_BY_LIBRARIES.fullmatch(name)
            ]
    assert unused == []
    assert [name for name in USED if not used[name]] == []  # no exception outlives its reason


def _registers(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator hands the function to somebody who calls it: a command, an operator, an autograd rule."""
    return any(re.match(r"(app|\w+\.command|torch\.library|\w+\.register|shares)", ast.unparse(d)) for d in node.decorator_list)


def keys(cls: Any) -> Iterator[str]:
    """The names of a section's keys and of those below; `grasp` is handed to core as it is, which refuses what it does not read."""
    for f in fields(cls):
        value = getattr(cls(), f.name)
        yield f.name
        if is_dataclass(value) and f.name != "grasp":
            yield from keys(type(value))


def test_every_key_of_the_configuration_is_read() -> None:
    """As an attribute, or by its name, outside the files that define and check the keys."""
    from speft_train.config import RunConfig

    definitions = {"config.py", "config_adapter.py", "config_checks.py", "config_names.py"}
    read: set[str] = set()
    for path in (ROOT / "packages/speft-train/src").rglob("*.py"):
        for node in parsed(path):
            if isinstance(node, ast.Attribute) and (path.name not in definitions or _is_read_there(node)):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name not in definitions:
                read |= set(re.findall(r"\w+", node.value)) if len(node.value) < 80 else set()
    found = set(keys(RunConfig))
    assert len(found) > 80
    assert sorted(found - read) == []


def _is_read_there(node: ast.Attribute) -> bool:
    """In config.py itself, what is taken from a finished configuration (`cfg.train`)."""
    return isinstance(node.value, (ast.Name, ast.Attribute)) and ast.unparse(node.value).startswith("cfg")


def test_one_word_for_a_thing() -> None:
    """The vocabulary of the project (docs/architecture.md): words that were decided against stand nowhere."""
    against = re.compile(r"\b(salience|sparsity adapter|un-?merge|de-?apply|unattach)\b", flags=re.I)
    texts = [*SOURCES, *PAGES, *(ROOT / "configs").rglob("*.yaml")]
    assert [str(p.relative_to(ROOT)) for p in texts if against.search(p.read_text(encoding="utf-8"))] == []
