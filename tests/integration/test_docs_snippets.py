"""The Python of the pages that show a part of a program: each block runs after what the page takes for granted.

README and the tutorials are whole programs and run in tests of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import pico
import speft_core as sc
from integration.pages import PAGES, ROOT, blocks

WHOLE = {"README.md", "tutorial-library.md"}
SHOWN = {"attach.md", "masks.md", "merging.md"}


def python_of(page: str) -> list[str]:
    return blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "python")


def random_mask(model: Any, seed: int) -> sc.SparsityMask:
    return sc.find_mask(model, metric="random", budget=sc.Budget(k=60), targets=["q_proj", "v_proj"], seed=seed)


def trained(model: Any, batch: Any, seed: int) -> sc.SparseAdapter:
    """A step of training from the base, and the base again."""
    tuner = sc.attach(model, random_mask(model, seed), train_dense=["score"])
    model(**batch).loss.backward()
    torch.optim.SGD(tuner.parameters(), lr=1.0).step()
    adapter = tuner.adapter()
    tuner.detach()
    return adapter


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A classifier, its batch and a mask; two adapters as `a`, `b` and as folders."""
    monkeypatch.chdir(tmp_path)
    causal = pico.llama()
    model = AutoModelForSequenceClassification.from_config(causal.config)
    batch = {**pico.batch(causal), "labels": torch.tensor([0, 1])}
    a, b = trained(model, batch, 1), trained(model, batch, 2)
    a.save("out/sql")
    b.save("out/chat")
    return {"torch": torch, "sc": sc, "model": model, "batch": batch, "mask": random_mask(model, 0), "a": a, "b": b}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_page_with_python_runs_somewhere() -> None:
    assert {page.name for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")} == WHOLE | SHOWN


def test_attach(given: dict[str, Any]) -> None:
    model, before = given["model"], bits(given["model"])
    train, bank = python_of("attach.md")
    step = "model(**batch).loss.backward(); optimizer.step(); moved = {n: t.clone() for n, t in model.state_dict().items()}"
    assert "\n...\n" in train
    exec(train.replace("\n...\n", f"\n{step}\n"), given)
    assert not same(given["moved"], before) and same(bits(model), before)
    assert sc.SparseAdapter.load("out/adapter").nnz == given["mask"].nnz
    assert "model.generate(...)" in bank
    exec(bank.replace("model.generate(...)", "inside = model(**batch).logits"), given)
    assert same(bits(model), before)
    with given["a"].applied(model):
        assert torch.equal(given["inside"], model(**given["batch"]).logits)


def test_masks(given: dict[str, Any]) -> None:
    (block,) = python_of("masks.md")
    given["fresh_batches"] = lambda number: [given["batch"]] * number
    step = "optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0); model(**batch).loss.backward()"
    assert "\n...\n" in block and "interval=1000" in block
    exec(block.replace("\n...\n", f"\n{step}\n").replace("interval=1000", "interval=1"), given)
    report = given["dynamic"].report()
    assert len(report["changes"]) == 1 and report["active"] == given["mask"].nnz


def test_merging(given: dict[str, Any]) -> None:
    merge, heads = python_of("merging.md")
    model, before = given["model"], bits(given["model"])
    exec(merge, given)
    merged = given["merged"]
    assert 0 < merged.nnz < given["a"].nnz
    with sc.MultiHeadModel(model, merged, heads={"sst2": given["a"].dense, "cola": given["b"].dense}) as made:
        made.save("adapters/heads")
    given["batch"] = {key: value for key, value in given["batch"].items() if key != "labels"}
    exec(heads, given)
    assert set(given["answers"]) == {"sst2", "cola"} and same(bits(model), before)
