"""The table of a sweep: what a column shows is told, and the best of it is marked, whether more or less is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from speft_core.errors import UserError
from speft_train import sweep, sweep_curves, sweep_table
from speft_train.config import from_mapping
from speft_train.sweep_config import Cell, Sweep

TREE = {"output_dir": "x", "model": {"name": "m"}, "data": {"train": "d.jsonl"}, "adapter": {"budget": {"k": 10}}}


def table(columns: Mapping[str, str | None]) -> Sweep:
    """Rows a and b, and columns with the score each is set to show."""
    settings = {column: {} if score is None else {"score": score} for column, score in columns.items()}
    return Sweep(tree=TREE, rows={"a": {}, "b": {}}, columns=settings, seeds=[0])


def finished(made: Sweep, figures: Mapping[tuple[str, str], Mapping[str, float]]) -> list[tuple[Cell, dict[str, Any]]]:
    return [
        (made.cell(row, column, 0, ()), {"adapted": found, "trainable_parameters": 10, "total_parameters": 1000})
        for (row, column), found in figures.items()
    ]


def best(made: Sweep, found: Any) -> set[str]:
    """Bold texts, the same in Markdown and in LaTeX."""
    import re

    text, tex = sweep_table.markdown(made, found), sweep_table.latex(made, found)
    marked = set(re.findall(r"\*\*(.+?)\*\*", text))
    assert marked == set(re.findall(r"\\textbf\{(.+?)\}", tex))
    return marked


def test_runs_with_a_loss_alone_are_shown_as_they_are_and_the_lowest_is_best() -> None:
    made = table({"score": None})
    found = finished(made, {("a", "score"): {"loss": 1.25, "perplexity": 3.5}, ("b", "score"): {"loss": 1.5, "perplexity": 4.5}})
    assert best(made, found) == {"1.25"}
    text = sweep_table.markdown(made, found)
    assert "| b | 10 | 1.50 |" in text and "score: loss (lower is better)" in text
    assert r"& score (loss) \\" in sweep_table.latex(made, found) and "| score (loss) |" in text


def test_curves_of_a_loss_are_not_in_percent() -> None:
    made = table({"score": None})
    for split in ({"loss": 1.25}, {"accuracy": 0.5, "loss": 1.25}):
        found = []
        for rate, k in ((1e-3, 10), (2e-3, 20)):
            cfg = from_mapping({**TREE, "train": {"learning_rate": rate}})
            results = {"adapted": {"loss": 9.0, "validation": split}, "trainable_parameters": k, "total_parameters": 1000}
            found.append((Cell("a", "score", 0, (), cfg), results))
        high, shown = (50.0, "score") if "accuracy" in split else (1.25, "score (loss)")
        assert [y for _, y, _ in sweep_curves.rate_curves(made, found)[shown]["gradient"]] == [high, high]


@pytest.mark.parametrize("figures", [{"loss": (2.0, 1.0, 3.0)}, {"loss": (float("nan"), 1.0, 3.0)}, {"accuracy": (0.1, 0.5, 0.3)}])
def test_the_candidate_that_is_chosen_is_the_best_by_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, figures: dict[str, tuple[float, ...]]
) -> None:
    rates = [1e-3, 2e-3, 3e-3]
    made = Sweep(tree=TREE, rows={"a": {}}, columns={"score": {}}, seeds=[0], tune={"train.learning_rate": rates})

    def found(cell: Cell) -> dict[str, Any]:
        number = rates.index(dict(cell.tuned)["train.learning_rate"])
        return {"adapted": {"split": "validation", **{name: values[number] for name, values in figures.items()}}}

    monkeypatch.setattr(sweep, "run_cells", lambda *_: None)
    monkeypatch.setattr(sweep, "figures", found)
    assert sweep._tuned(made, sweep.Console(), sweep.Settings()) == {("a", "score"): (("train.learning_rate", 2e-3),)}


@pytest.mark.parametrize("score", ["loss", None])
def test_the_best_mean_of_losses_is_the_lowest(score: str | None) -> None:
    made = table({"A": score, "B": score})
    found = finished(made, {("a", "A"): {"loss": 1.0}, ("b", "A"): {"loss": 2.0}, ("a", "B"): {"loss": 2.5}, ("b", "B"): {"loss": 3.0}})
    assert best(made, found) == {"1.00", "2.50", "1.75"}
    assert "| a | 10 | **1.00** | **2.50** | **1.75** | 2 |" in sweep_table.markdown(made, found)


def test_a_share_and_a_loss_have_no_mean() -> None:
    made = table({"A": "accuracy", "B": None})
    found = finished(
        made,
        {("a", "A"): {"accuracy": 0.5}, ("b", "A"): {"accuracy": 0.25}, ("a", "B"): {"loss": 2.5}, ("b", "B"): {"loss": 3.0}},
    )  # fmt: skip
    text = sweep_table.markdown(made, found)
    assert "|  | trained | A | B (loss) | wins |" in text and "| a | 10 | **50.00** | **2.50** | 2 |" in text
    assert "mean" not in sweep_table.latex(made, found) and best(made, found) == {"50.00", "2.50"}
    assert "A: accuracy, B: loss (lower is better)" in text


def test_a_column_shows_one_figure_that_all_its_runs_have() -> None:
    made = table({"score": None})
    found = finished(made, {("a", "score"): {"exact_match": 0.5, "loss": 2.0}, ("b", "score"): {"loss": 1.0}})
    assert best(made, found) == {"1.00"} and "| a | 10 | 2.00 |" in sweep_table.markdown(made, found)


def test_nothing_is_marked_where_nothing_has_run() -> None:
    made = table({"A": None, "B": "loss"})
    assert best(made, []) == set() and "| a | - | - | - | - | 0 |" in sweep_table.markdown(made, [])


@pytest.mark.parametrize(
    ("score", "figures", "words"),
    [
        ("accuracy", {"loss": 1.0}, "sweep.columns.A.score must be .*; got accuracy, and their figures are loss$"),
        (None, None, "got none, and their figures are none"),
    ],
)
def test_runs_without_a_figure_in_common_are_told(score: str | None, figures: Any, words: str) -> None:
    made = table({"A": score})
    with pytest.raises(UserError, match=words):
        sweep_table.markdown(made, finished(made, {("a", "A"): figures}))
