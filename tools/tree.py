"""Write the tree in README.md: every file of the packages, benchmarks, configs, tools and docs with one phrase.

    python tools/tree.py            write it
    python tools/tree.py --check    exit with 1 when the README's tree is not the repository's

The phrase is the first sentence of a module's documentation, of a configuration's leading comment, or a page's title.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- tree, written by tools/tree.py -->", "<!-- end of tree -->"
FOLDERS = (
    "packages/speft-core/src/speft_core", "packages/speft-train/src/speft_train", "packages/speft-hub/src/speft_hub",
    "configs", "benchmarks", "tools", "docs",
)  # fmt: skip
LONGEST = 112


def phrase(path: Path) -> str:
    """What a file says of itself in its first sentence, up to its first semicolon; empty when it says nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        said = text.partition("\n")[0].lstrip("# ")
    else:
        comments = re.match(r"(?:(?:#|//|/\*| \*) ?.*\n)*", text)
        said = re.sub(r"^(#|//|/\*| \*) ?|\*/", "", comments[0] if comments else "", flags=re.M)
    sentence = re.split(r"(?<!\be\.g)[.;](?:\s|$)|\n\n", " ".join(said.split("\n\n")[0].split()))[0]
    while len(sentence) > LONGEST or sentence.count("(") != sentence.count(")"):
        shorter = re.sub(r"(?:: |, | \()[^:,(]*$", "", sentence)
        if shorter == sentence:
            break
        sentence = shorter
    return sentence


def lines(folder: Path) -> list[str]:
    """A line for each file below a folder; a package's own phrase stands beside its folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml", ".md", ".c", ".h") and "__pycache__" not in p.parts)
    width = max(len(str(p.relative_to(folder))) for p in files) + 2
    shown = []
    for path in files:
        name = str(path.relative_to(folder))
        if path.name != "__init__.py" or folder not in (path.parent, path.parent.parent):
            shown.append(f"  {name:<{width}}{phrase(path)}")
        elif path.parent != folder:
            shown.append(f"  {name.removesuffix('__init__.py'):<{width}}{phrase(path)}")
    return [f"{folder.relative_to(ROOT)}/", *(line.rstrip() for line in shown)]


def text() -> str:
    """The whole tree."""
    parts = ["\n".join(lines(ROOT / folder)) for folder in FOLDERS]
    return f"{BEGIN}\n\n```text\n" + "\n\n".join(parts) + f"\n```\n\n{END}"


def main(words: list[str] | None = None) -> int:
    """Write or check the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(words)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    wanted = before + text() + rest.partition(END)[2]
    if asked.check:
        if wanted != page:
            print("README.md's tree is not current: python tools/tree.py", file=sys.stderr)
        return int(wanted != page)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
