"""Draw the import graph of the three packages from their sources, as Mermaid, into docs/architecture.md.

    python tools/import_graph.py            write it
    python tools/import_graph.py --check    exit with 1 when the page is not current, or when modules import in a circle

An arrow means "imports", also inside functions. Arrows that follow from others are left out (transitive reduction); `ops`,
`saliency` and other sub-packages are one box each, their insides are drawn apart.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- import graph, written by tools/import_graph.py -->", "<!-- end of import graph -->"
PACKAGES = {"speft_core": "speft-core", "speft_train": "speft-train", "speft_hub": "speft-hub"}
LEAVES = {"errors", "names"}  # imported nearly everywhere: a box with thirty arrows says nothing

Graph = dict[str, set[str]]


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    source = ROOT / "packages" / PACKAGES[package] / "src"
    found = {}
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, name: str, known: Iterable[str], late: bool = True) -> set[str]:
    """The modules among `known` that the file of module `name` imports; without `late`, only when it is loaded."""
    known, found = set(known), set[str]()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {id(n) for top in ast.walk(tree) if _for_types(top) for part in top.body for n in ast.walk(part)}
    if not late:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        left_out |= {id(n) for top in ast.walk(tree) if isinstance(top, functions) for n in ast.walk(top)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found |= (whole & known) or {base}
    return (found & known) - {name}


def _for_types(node: ast.AST) -> TypeGuard[ast.If]:
    """Whether it is `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def graph(late: bool = True) -> Graph:
    """module -> modules it imports, all three packages."""
    files = {name: path for package in PACKAGES for name, path in modules(package).items()}
    return {name: imported(path, name, files, late) for name, path in files.items()}


def circles() -> list[list[str]]:
    """Circles when modules are loaded; in speft_core and speft_hub also those through imports inside functions."""
    strict = [c for c in cycles(graph()) if not c[0].startswith("speft_train")]
    return strict + [c for c in cycles(graph(late=False)) if c not in strict]


def cycles(found: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each once; empty when there is none (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(found.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                circles.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(found):
        if node not in order:
            visit(node)
    return circles


def boxed(found: Mapping[str, set[str]], package: str) -> Graph:
    """The graph of one package or sub-package: its own modules, each sub-package as one box."""

    def box(name: str) -> str | None:
        if not name.startswith(package + "."):
            return None
        first = name[len(package) + 1 :].split(".")[0]
        return None if first in LEAVES or first == "__main__" else first

    boxes: Graph = {}
    for name, others in found.items():
        mine = box(name)
        if mine is None:
            continue
        boxes.setdefault(mine, set()).update(other for o in others if (other := box(o)) not in (None, mine))
    return boxes


def reduced(found: Graph) -> Graph:
    """Without the arrows that follow from others. Boxes that import in a circle keep all of theirs."""
    reach: dict[str, set[str]] = {}
    for start in found:
        seen, todo = set[str](), list(found[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += found.get(node, ())
        reach[start] = seen

    def needed(node: str, other: str) -> bool:
        between = found[node] - {other, node}
        return node in reach[node] or not any(other in reach[p] for p in between)

    return {node: {other for other in others if needed(node, other)} for node, others in found.items()}


def mermaid(found: Graph) -> str:
    """A Mermaid flow chart; names alone where a box has no arrow."""
    joined = {node for node, others in found.items() for node in (node, *others) if others}
    lines = ["```mermaid", "flowchart TD"]
    for node in sorted(found):
        lines += [f"  {node} --> {' & '.join(sorted(found[node]))}"] if found[node] else []
    lines += [f"  {node}" for node in sorted(set(found) - joined)]
    return "\n".join([*lines, "```"])


def text() -> str:
    """All graphs, with their headings."""
    whole = graph()
    parts = []
    for package in PACKAGES:
        inner = sorted({n.split(".")[1] for n in whole if n.startswith(package + ".") and n.count(".") > 1})
        for part in (package, *(f"{package}.{name}" for name in inner)):
            drawn = reduced(boxed(whole, part))
            if sum(map(len, drawn.values())):
                parts.append(f"`{part}`\n\n{mermaid(drawn)}")
    hidden = " and ".join(f"`{name}`" for name in sorted(LEAVES))
    return f"{BEGIN}\n\nNot drawn: {hidden}, which nearly all import.\n\n" + "\n\n".join(parts) + f"\n\n{END}"


def main(words: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(words)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + text() + after
    found = circles()
    for circle in found:
        print(f"these import each other: {', '.join(circle)}", file=sys.stderr)
    if asked.check:
        if wanted != page:
            print(f"{PAGE.name} is not current: python tools/import_graph.py", file=sys.stderr)
        return int(wanted != page or bool(found))
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
