"""Pages that are written from the code are what the code says; modules do not import each other in circles."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from integration.pages import ROOT, tool


@pytest.mark.parametrize("name", ["import_graph", "public_api", "reference", "tree"])
def test_the_page_is_current(name: str) -> None:
    run = subprocess.run([sys.executable, f"tools/{name}.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_circle_of_imports_is_found() -> None:
    graph = tool("import_graph")
    assert graph.cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert graph.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    graph, file = tool("import_graph"), tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom . import a\nfrom .a import thing\nfrom ..q import b\nimport p.c\n"
        "if TYPE_CHECKING:\n    from . import d\ndef f():\n    from . import e\n"
    )
    known = {"p.a", "p.c", "p.d", "p.e"}
    assert graph.imported(file, "p.x", known) == {"p.a", "p.c", "p.e"}
    assert graph.imported(file, "p.x", known, late=False) == {"p.a", "p.c"}
    assert graph.imported(file, "r.p.x", {"r.p.a", "r.q.b", "r.q", "r.p.d"}) == {"r.p.a", "r.q.b"}


def test_arrows_that_follow_from_others_are_left_out() -> None:
    graph = tool("import_graph")
    assert graph.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_a_changed_signature_is_noticed() -> None:
    api = tool("public_api")
    assert "`find_mask(model" in api.text() and "`push(folder" in api.text()

    def other(model: object, extra: int = 0) -> None:
        """Something else."""

    assert api.entry("find_mask", other) != api.entry("find_mask", __import__("speft_core").find_mask)


def test_each_file_says_what_it_is_in_one_phrase() -> None:
    tree = tool("tree")
    lines = [line for line in tree.text().splitlines() if line.startswith("  ")]
    assert len(lines) > 200
    assert [line for line in lines if not re.match(r"  \S+ {2,}\S.{3,}", line)] == []
    assert max(len(re.split(r" {2,}", line.strip(), maxsplit=1)[1]) for line in lines) <= 170
