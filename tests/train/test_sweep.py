"""Sweeps: the cells of a table, what is skipped, what is chosen on validation data, and the table's forms."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import pico
import pico_tokenizers
from speft_core.errors import UserError
from speft_train import sweep, sweep_curves, sweep_table
from speft_train.config import from_mapping
from speft_train.sweep_config import Cell, Sweep, load_sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = pico_tokenizers.byte_level()
    pico.bert(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    rows = [{"text": "xy"[place % 2] * (1 + place % 4), "label": place % 2} for place in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "model": {"name": str(model), "dtype": "float32", "task": "sequence_classification"},
        "data": {"train": str(data), "test": str(data), "validation_from_train": 4},
        "adapter": {"metric": "magnitude", "targets": ["query"], "budget": {"k": 20}},
        "train": {
            "global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True,
            "report_to": "none",
        },
        "evaluate": {"base": False},
        "sweep": {
            "seeds": 2,
            "rows": {"sparse": {}, "head": {"adapter.method": "head"}},
            "columns": {"A": {"score": "accuracy"}, "B": {"score": "loss", "data.max_length": 8}},
        },
    }  # fmt: skip
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def go(
    config: Path, *overrides: str, grid: list[str] | None = None, seeds: int | None = None, lock: Path | None = None
) -> None:
    sweep.execute(config, list(overrides), grid or [], seeds, False, sweep.Settings(lock=lock))


def test_a_table_is_run_written_and_not_run_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(config, lock=tmp_path / "lock")
    text = (tmp_path / "out/table.md").read_text()
    assert "| sparse |" in text and "±" in text and "**" in text
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert len(lines) == 8 and {line["seed"] for line in lines} == {"0", "1"}
    assert r"\toprule" in (tmp_path / "out/table.tex").read_text() and (tmp_path / "out/scores.png").stat().st_size > 1000

    def never(cell: Any) -> None:
        raise AssertionError(f"{cell.name} ran again")

    monkeypatch.setattr(sweep, "_here", never)
    go(config)
    assert "8 of 8 runs are done already" in capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text() == text


def test_a_table_of_what_is_done_runs_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_sweep(config)
    sweep.run_cells([made.cell("head", "A", 0, ())], sweep.Console(), sweep.Settings())
    monkeypatch.setattr(sweep, "_here", None)
    sweep.execute(config, [], [], None, False, sweep.Settings(table_only=True))
    assert len(list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))) == 1
    assert "| sparse | - | - | - |" in (tmp_path / "out/table.md").read_text()


def test_a_grid_makes_a_row_of_each_combination(config: Path) -> None:
    made = load_sweep(config, [], ["adapter.metric=magnitude,random", "train.learning_rate=1e-3,2e-3"])
    assert len(made.rows) == 8 and "head, metric random, learning_rate 0.002" in made.rows
    folders = {made.cell(row, "A", 0, ()).cfg.output_dir for row in made.rows}
    assert len(folders) == 8


def test_settings_are_chosen_by_the_validation_score(config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["sweep"] |= {"tune": {"train.learning_rate": [1e-6, 5e-2]}, "rows": {"full": {"adapter.method": "full"}}, "seeds": 1}
    tree["sweep"]["columns"] = {"B": {"score": "loss"}}
    tree["train"]["max_steps"] = 20
    config.write_text(yaml.safe_dump(tree))
    go(config)
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    validation = {}
    for rate in ("1e-06", "0.05"):
        found = json.loads((tmp_path / f"out/B/full/learning_rate-{rate}/seed0/results.json").read_text())
        validation[rate] = found["adapted"]["validation"]["loss"]
    best = min(validation, key=validation.__getitem__)
    assert len(lines) == 1 and float(lines[0]["train.learning_rate"]) == float(best)
    assert len(set(validation.values())) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["evaluate.enabled=false"], "evaluate.enabled must be true"),
        (["sweep.tune.train.learning_rate=[1e-3,1e-2]", "data.validation_from_train=0"], "set data.validation or"),
    ],
)
def test_what_cannot_be_shown_or_chosen_is_refused_before_anything_runs(config: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(config, given)


def test_equal_scores_are_told_apart_by_the_loss(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_sweep(config, ["sweep.tune.train.learning_rate=[1e-3,2e-3,3e-3]", "sweep.columns.B=null"])
    losses = {1e-3: 0.7, 2e-3: 0.6, 3e-3: 0.65}

    def found(cell: Cell) -> dict[str, Any]:
        rate = dict(cell.tuned)["train.learning_rate"]
        better = 0.51 if cell.row == "head" and rate == 3e-3 else 0.5
        return {"adapted": {"validation": {"accuracy": better, "loss": losses[rate]}}}

    monkeypatch.setattr(sweep, "run_cells", lambda *_: None)
    monkeypatch.setattr(sweep, "figures", found)
    chosen = sweep._tuned(made, sweep.Console(), sweep.Settings())
    assert {row: dict(tuned)["train.learning_rate"] for (row, _), tuned in chosen.items()} == {"sparse": 2e-3, "head": 3e-3}


def test_a_row_may_have_candidates_of_its_own(config: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["sweep"] |= {"tune": {"train.learning_rate": [1e-3, 5e-2], "train.max_steps": [1, 2]}}
    tree["sweep"]["rows"]["full"] = {"adapter.method": "full", "tune": {"train.learning_rate": [1e-5]}}
    config.write_text(yaml.safe_dump(tree))
    made = load_sweep(config)
    rates = {row: [dict(tuned)["train.learning_rate"] for tuned in made.candidates(row)] for row in ("head", "full")}
    assert rates == {"head": [1e-3, 1e-3, 5e-2, 5e-2], "full": [1e-5, 1e-5]}
    assert [made.cell("full", "A", 0, tuned).cfg.train["max_steps"] for tuned in made.candidates("full")] == [1, 2]
    untuned = load_sweep(config, ["sweep.tune=null"])
    assert untuned.candidates("full") == [()] and untuned.cell("full", "A", 0, ()).cfg.train["learning_rate"] == 1e-3
    for own, message in (({"seed": [1]}, "seed is not tuned"), ({"train.max_steps": 3}, "must map settings to lists")):
        tree["sweep"]["rows"]["full"]["tune"] = own
        config.write_text(yaml.safe_dump(tree))
        with pytest.raises(UserError, match=f"sweep.rows.full.tune.*{message}"):
            load_sweep(config)


def test_the_command_line_reaches_into_rows_columns_and_candidates(config: Path) -> None:
    given = ["sweep.tune.train.learning_rate=[1e-2]", "sweep.rows.head.train.max_steps=7", "sweep.columns.A.adapter.budget.density=0.5"]
    made = load_sweep(config, given)
    assert made.candidates("head") == [(("train.learning_rate", 1e-2),)]
    cfg = made.cell("head", "A", 0, made.candidates("head")[0]).cfg
    assert (cfg.train["learning_rate"], cfg.train["max_steps"], cfg.train["global_batch_size"]) == (1e-2, 7, 4)
    assert (cfg.adapter.method, cfg.adapter.budget.density, cfg.adapter.budget.k) == ("head", 0.5, None)


def test_one_failing_run_does_not_stop_the_others(config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["sweep"] |= {"rows": {"bad": {"adapter.targets": ["nothing"]}, "good": {}}, "seeds": 1}
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="2 of 4 runs failed; the first, bad on A, seed 0: targets: 'nothing'"):
        go(config)
    assert len(list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "stage mask ran out of memory; lower adapter.calib"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_cell_that_breaks_is_told_at_the_end_too(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    """Out of memory, and what is a bug, in the cells of one process as in those of several; a bug's traceback is shown."""
    from speft_train import scoring

    def fails(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(scoring, "score", fails)
    with pytest.raises(UserError, match="2 of 4 runs failed; the first, sparse on A, seed 0: ") as caught:
        go(config, "sweep.seeds=1")
    assert told in str(caught.value)
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert {line["row"] for line in lines} == {"head"} and len(lines) == 2


def test_a_signal_ends_a_sweep_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speft_train.signals import Stopped

    calls: list[Any] = []

    def stopped(cell: Cell) -> None:
        calls.append(cell)
        raise Stopped(15, "interrupted")

    monkeypatch.setattr(sweep, "_here", stopped)
    with pytest.raises(Stopped):
        go(config)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"row": {}}, "sweep.row: unknown key. Did you mean 'rows'"),
        ({"columns": {"A": {"score": "accuracie"}}}, "score must be one of"),
        ({"seeds": 0}, "seeds must be a count of at least 1"),
        ({"tune": {"train.learning_rate": 1e-3}}, "sweep.tune must map settings to lists of values"),
        ({"tune": [1e-3]}, "sweep.tune must map settings to lists of values"),
    ],
)
def test_mistakes_of_a_sweep_section(config: Path, section: dict[str, Any], message: str) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["sweep"] = section
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        load_sweep(config)


def test_the_table_marks_the_best_and_counts_wins() -> None:
    made = Sweep(
        tree={"output_dir": "x"},
        rows={"a": {}, "b": {}},
        columns={"A": {"score": "accuracy"}, "B": {"score": "loss"}},
        seeds=[0, 1],
    )

    class Place:
        def __init__(self, row: str, column: str) -> None:
            self.row, self.column, self.seed, self.tuned = row, column, 0, ()

    scores = {("a", "A"): (0.8, 0.6), ("b", "A"): (0.9, 0.9), ("a", "B"): (0.1, 0.3), ("b", "B"): (0.5, 0.5)}
    found: Any = [
        (Place(row, column), {"adapted": {"accuracy": v, "loss": v}, "trainable_parameters": 1000})
        for (row, column), values in scores.items()
        for v in values
    ]
    text = sweep_table.markdown(made, found)
    assert "| a | 1,000 | 70.00 ± 14.14 | **0.20 ± 0.14** |" in text
    assert "| b | 1,000 | **90.00 ± 0.00** | 0.50 ± 0.00 |" in text
    assert sweep_table.latex(made, found).count(r"\textbf") == 2, "a share and a loss have no mean"


def place(metric: str, rate: float, k: int, seed: int, score: float) -> Any:
    """A finished cell of one column, and its results."""
    tree = {"output_dir": "x", "model": {"name": "m"}, "data": {"train": "d.jsonl"}, "train": {"learning_rate": rate}}
    cfg = from_mapping({**tree, "adapter": {"metric": metric, "budget": {"k": k}}})
    found = {"adapted": {"accuracy": score, "validation": {"accuracy": score / 2}}, "trainable_parameters": k}
    return Cell(f"{metric} {k}", "A", seed, (), cfg), {**found, "total_parameters": 1000}


def test_curves_are_drawn_of_what_varies(tmp_path: Path) -> None:
    made = Sweep(tree={"output_dir": str(tmp_path)}, rows={}, columns={"A": {"score": "accuracy"}}, seeds=[0, 1])
    one_rate = [place("gradient", 1e-3, k, seed, k / 100 + seed / 10) for k in (10, 20) for seed in (0, 1)]
    one_rate.append(place("random", 1e-3, 10, 0, 0.3))
    curves = sweep_curves.density_curves(made, one_rate)
    line = [[round(value, 6) for value in point] for point in curves["A"]["gradient"]]
    assert line == [[1.0, 15.0, 7.071068], [2.0, 25.0, 7.071068]] and curves["A"]["random"] == [(1.0, 30.0, 0.0)]
    assert sweep_curves.rate_curves(made, one_rate) == {}, "one learning rate is no curve"
    rates = [place("gradient", rate, 10, 0, 100 * rate) for rate in (1e-3, 4e-3)]
    assert sweep_curves.rate_curves(made, rates) == {
        "A": {"gradient": [(1e-3, pytest.approx(5.0), 0), (4e-3, pytest.approx(20.0), 0)]}
    }
    assert sweep_curves.density_curves(made, rates) == {}
    both = [place("gradient", rate, k, 0, 0.5) for rate in (1e-3, 4e-3) for k in (10, 20)]
    assert set(sweep_curves.density_curves(made, both)["A"]) == {"gradient, lr 0.001", "gradient, lr 0.004"}
    assert set(sweep_curves.rate_curves(made, both)["A"]) == {"gradient, 10", "gradient, 20"}
    assert sweep_curves.write(made, both, both) == [sweep_curves.DENSITY, sweep_curves.RATE]
    for name in (sweep_curves.DENSITY, sweep_curves.RATE):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_starts_on_the_gpu_that_is_free(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run is long: all others must go to the other GPU meanwhile."""
    made = load_sweep(config)
    cells = [made.cell(row, "A", seed, ()) for seed in (0, 1) for row in ("sparse", "head")]
    others, ran = threading.Barrier(2, timeout=30), list[tuple[str, str | None]]()

    def long_or_short(cell: Cell, device: str | None) -> None:
        ran.append((cell.name, device))
        if cell is cells[0] or cell is cells[-1]:  # the long one ends when the last one has begun
            others.wait()

    monkeypatch.setattr(sweep, "_elsewhere", long_or_short)
    settings = sweep.Settings(jobs=2, devices=["4", "7"])
    sweep.run_cells(cells, sweep.Console(), settings)
    assert not settings.failed and len(ran) == 4
    long = dict(ran)[cells[0].name]
    assert {device for name, device in ran if name != cells[0].name} == {"4", "7"} - {long}


def test_more_runs_than_gpus_share_them_evenly() -> None:
    devices = sweep.Devices(["0", "1"])
    with devices.one() as a, devices.one() as b, devices.one() as c, devices.one() as d:
        assert sorted([a, b, c, d]) == ["0", "0", "1", "1"]
    with devices.one() as a, devices.one() as b:
        assert {a, b} == {"0", "1"}


def test_one_run_at_a_time_sees_its_gpu_alone(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "seen"
    monkeypatch.setattr(sweep, "RUN", f"import os; open({str(out)!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ';')")
    made = load_sweep(config)
    settings = sweep.Settings(devices=["3"], lock=tmp_path / "lock")
    settings.check()
    sweep.run_cells([made.cell("head", "A", seed, ()) for seed in (0, 1)], sweep.Console(), settings)
    assert out.read_text() == "3;3;" and not settings.failed and (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (sweep.Settings(jobs=2, lock=Path("lock")), "--lock holds a file for one run at a time, --jobs 2"),
        (sweep.Settings(jobs=2, devices=["0", "0"]), "must name each GPU once, got 0,0"),
        (sweep.Settings(devices=["0", "1"]), "--jobs is 1: some would idle; give --jobs 2"),
    ],
)
def test_what_cannot_all_be_done_is_refused(config: Path, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.execute(config, [], [], None, False, settings)
