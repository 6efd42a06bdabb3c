"""Every experiment of both papers plans with the count of trained scalars that the paper gives, from shapes alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speft_core.errors import UserError
from speft_train import cli, refusals, sweep
from speft_train.config import load_config
from speft_train.sweep_config import load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(p.relative_to(CONFIGS).as_posix() for p in (*CONFIGS.glob("speft/*.yaml"), *CONFIGS.glob("sparta/*.yaml")))
# k of table 1 and of the instruction tables (SPEFT, arXiv 2412.13488).
SPEFT_K = {
    "speft/table_opt_125m.yaml": 442_368,
    "speft/table_opt_350m.yaml": 1_179_648,
    "speft/table_opt_1.3b.yaml": 2_359_296,
    "speft/table_bert_base.yaml": 294_912,
    "speft/table_roberta_base.yaml": 294_912,
    "speft/scope_opt_125m.yaml": 442_368,
    "speft/scope_opt_350m.yaml": 1_179_648,
    "speft/scope_bert_base.yaml": 294_912,
    "speft/gemma2_2b_alpaca.yaml": 25_559_040,
    "speft/gemma2_2b_oasst2.yaml": 25_559_040,
    "speft/gemma2_2b_metamath.yaml": 25_559_040,
    "speft/qwen2_7b_alpaca.yaml": 40_370_176,
    "speft/qwen2_7b_oasst2.yaml": 40_370_176,
    "speft/table1_minilm.yaml": 73_728,
    "speft/scope_minilm.yaml": 73_728,
    "speft/smollm2_instruct.yaml": 921_600,
}
# The share of all parameters that the paper prints beside k, in percent.
SPEFT_SHARE = {
    "speft/table_opt_125m.yaml": 0.35,
    "speft/table_opt_350m.yaml": 0.35,
    "speft/table_opt_1.3b.yaml": 0.18,
    "speft/table_bert_base.yaml": 0.27,
    "speft/table_roberta_base.yaml": 0.24,
    "speft/gemma2_2b_alpaca.yaml": 0.97,
    "speft/qwen2_7b_alpaca.yaml": 0.53,
}
# SpaRTA counts its scalars by the share of the weights outside embeddings and head.
SPARTA_MILLIONS = {"sparse 5 %": 99.0, "sparse 0.5 %": 9.9, "sparse 0.05 %": 0.99}


@pytest.mark.parametrize("file", sorted(SPEFT_K))
def test_every_row_with_a_budget_trains_as_many_scalars_as_the_paper(file: str) -> None:
    made = load_sweep(CONFIGS / file)
    column = next(iter(made.columns))
    counts = {}
    for row in made.rows:
        cell = made.cell(row, column, made.seeds[0], made.candidates(row)[0])
        if cell.cfg.adapter.method in ("sparse", "lora", "pissa"):
            counts[row] = sweep.planned_count(cell)
    assert counts and set(counts.values()) == {SPEFT_K[file]}


@pytest.mark.parametrize("file", sorted(SPEFT_SHARE))
def test_the_share_of_all_parameters_is_the_papers(file: str) -> None:
    from speft_core.targets import base_parameters
    from speft_train import models

    total = sum(p.numel() for p in base_parameters(models.meta_model(load_config(CONFIGS / file))).values())
    assert round(100 * SPEFT_K[file] / total, 2) == pytest.approx(SPEFT_SHARE[file], abs=0.0101)


@pytest.mark.parametrize("file", ["sparta/imdb_gemma_2b.yaml", "sparta/imdb_gemma_2b_it.yaml"])
def test_sparta_counts_outside_the_embeddings(file: str) -> None:
    made = load_sweep(CONFIGS / file)
    for row, millions in SPARTA_MILLIONS.items():
        cell = made.cell(row, next(iter(made.columns)), 0, made.candidates(row)[0])
        assert sweep.planned_count(cell) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("file", FILES)
def test_every_cell_of_every_table_is_a_valid_run(file: str) -> None:
    made = load_sweep(CONFIGS / file, ["sweep.vars.root=data"])
    cells = made.all_cells()
    assert len({cell.cfg.output_dir for cell in cells}) == len(cells) >= 1


@pytest.mark.parametrize("file", FILES)
def test_every_config_passes_a_dry_run(file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.execute(CONFIGS / file, ["sweep.vars.root=data", f"output_dir={tmp_path / 'run'}"], dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing was loaded, trained or written" in shown and not (tmp_path / "run").exists()
    if file in SPEFT_K:
        assert f"k = {SPEFT_K[file]:,} trained by method sparse" in shown


SPLITS = {  # of the data sets on the Hub that have more than training rows
    "nyu-mll/glue": ("train", "validation", "test", "validation_matched", "validation_mismatched"),
    "stanfordnlp/imdb": ("train", "test"),
}
EVERY = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if path.parent.name != "parts")


@pytest.mark.parametrize("file", EVERY)
def test_every_config_can_start_and_has_rows_to_measure(file: str) -> None:
    """On one process: the batch divides, nothing is refused, and there are test data, or rows held out for validation. The test rows
    of GLUE on the Hub have no labels.
    """
    made = load_sweep(CONFIGS / file, ["sweep.vars.root=data"])
    for cfg in (load_config(CONFIGS / file, ["sweep.vars.root=data"]), *(cell.cfg for cell in made.all_cells())):
        refusals.check_run(cfg)
        held = cfg.data.test is not None or cfg.data.validation is not None or cfg.data.validation_from_train > 0
        assert cfg.evaluate.enabled and (held or cfg.data.train.startswith("bundled:") or cfg.data.train in SPLITS)
        if cfg.data.train == "nyu-mll/glue":
            assert cfg.data.test_split.startswith("validation") and cfg.data.test_split in SPLITS[cfg.data.train]


def test_the_launch_in_the_readme_divides_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("qwen2_7b_alpaca.yaml", *(f for f in EVERY if re.search(r"speft/(qwen2|gemma2|llama3)", f))):
        for world, fits in ((8, True), (6, False)):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", "0")
            if fits:
                refusals.check_run(load_config(CONFIGS / file))
            else:
                with pytest.raises(UserError, match="multiple of the number of processes"):
                    refusals.check_run(load_config(CONFIGS / file))


def test_no_config_says_again_what_another_says() -> None:
    """No two lines of settings in a row stand in two files, comments aside."""
    seen: dict[tuple[str, str], str] = {}
    for path in sorted((*CONFIGS.glob("speft/*.yaml"), *CONFIGS.glob("sparta/*.yaml"), *CONFIGS.glob("parts/*.yaml"))):
        lines = [line.rstrip() for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        for pair in zip(lines, lines[1:], strict=False):
            if len("".join(pair)) > 60 and not re.match(r"\s*(base|output_dir|sweep|rows|columns):", pair[0]):
                other = seen.setdefault(pair, path.name)
                assert other == path.name, f"{path.name} repeats {other}: {pair}"


def test_a_table_of_ones_own_is_short() -> None:
    lines = (CONFIGS / "speft/csv_pairs.yaml").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 15
