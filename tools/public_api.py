"""Write docs/api.md: every public name of the packages with its signature and what it is for.

    python tools/public_api.py            write it
    python tools/public_api.py --check    exit with 1 when the page is not what the packages offer

Public is what `__all__` of a package lists. The page is the one place that lists it: a change of it is a change of the contract
and has its line in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/api.md"
HEAD = """# Public API

What other code may rely on, written by `python tools/public_api.py` from the packages themselves; a test fails when this page and
the code differ. `speft_train` has few public Python names (`classification.load_classifier`, `lm.rows.splits`, `bundled.folder`): its
contract is the two commands, the configuration and the run's folder.
"""
PACKAGES = ("speft_core", "speft_hub")


def signature(thing: Any) -> str:
    """Its parameters as the source writes them, on one line."""
    shown = str(inspect.signature(thing))
    shown = shown.replace("<factory>", "...")
    shown = re.sub(r"<function (\w+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>", lambda m: m[1] or m[2], shown)
    return shown.replace("'", "").replace("~", "").replace("(self, ", "(").replace("(self)", "()")


def first_sentence(thing: Any) -> str:
    """The first line of its documentation."""
    return (inspect.getdoc(thing) or "").splitlines()[0] if inspect.getdoc(thing) else ""


def members(thing: type) -> list[str]:
    """A line for each public method and property that the class itself defines."""
    lines = []
    for name, value in sorted(vars(thing).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            lines.append(f"  - `.{name}`: {first_sentence(value.fget)}")
        elif isinstance(value, (staticmethod, classmethod)):
            lines.append(f"  - `.{name}{signature(getattr(thing, name))}`: {first_sentence(value.__func__)}")
        elif inspect.isfunction(value):
            lines.append(f"  - `.{name}{signature(value)}`: {first_sentence(value)}")
    return lines


def entry(name: str, thing: Any) -> list[str]:
    """The lines of one name."""
    if isinstance(thing, dict):
        return [f"- `{name}`: a table; its rows are {', '.join(f'`{key}`' for key in thing)}"]
    if inspect.isclass(thing):
        plain = issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)
        shown = "" if plain else signature(thing)
        return [f"- `{name}{shown}`: {first_sentence(thing)}", *members(thing)]
    return [f"- `{name}{signature(thing)}`: {first_sentence(thing)}"]


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for package in PACKAGES:
        module = importlib.import_module(package)
        lines = [line for name in sorted(module.__all__, key=str.lower) for line in entry(name, getattr(module, name))]
        parts.append(f"## {package}\n\n{first_sentence(module)}\n\n" + "\n".join(line.rstrip(": ") for line in lines) + "\n")
    return "\n".join(parts)


def main(words: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(words)
    wanted = text()
    if asked.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
        if not same:
            print(
                "docs/api.md is not what the packages offer: python tools/public_api.py, and a line in CHANGELOG.md",
                file=sys.stderr,
            )
        return int(not same)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
