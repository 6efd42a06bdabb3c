"""Rows from files, from the generator and from the Hub; the data of a run put together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_tokenizers import byte_level
from speft_core import UserError
from speft_train.config import DataConfig, RunConfig, from_mapping
from speft_train.data import build, calibration_rows, fingerprint, load_rows, load_splits
from speft_train.data.word_problems import make_problems

ROWS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(10)]
ANY = DataConfig(train="unused")


def json_lines(folder: Path, rows: list[Any] = ROWS, name: str = "d.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(**data: Any) -> RunConfig:
    return from_mapping(
        {"output_dir": "o", "model": {"name": "m"}, "adapter": {"budget": {"k": 1}}, "data": {"train": "t", **data}}
    )


def error_of(path: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(path), split, None, ANY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_lines_csv_tsv_and_json_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question,answer\n" + "".join(f"q{i},#### {i}\n" for i in range(10)))
    (tmp_path / "d.tsv").write_text("question\tanswer\n" + "".join(f"q{i}\t#### {i}\n" for i in range(10)))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    json_lines(tmp_path)
    for ending in ("jsonl", "csv", "tsv", "json"):
        assert load_rows(str(tmp_path / f"d.{ending}"), "train", None, ANY) == ROWS, ending
        assert load_rows(str(tmp_path / f"d.{ending}"), "train", 3, ANY) == ROWS[:3], ending


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), min_size=1, max_size=5))
def test_any_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    """Texts may hold line separators that are no line ends in JSON Lines, such as U+2028."""
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="\n")
    assert load_rows(str(path), "train", None, ANY) == rows


def test_byte_order_marks_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "1"}\r\n\r\n{"a": "2"}\r\n')
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfa\r\n1\r\n2\r\n")
    for name in ("d.jsonl", "d.csv"):
        assert load_rows(str(tmp_path / name), "train", None, ANY) == [{"a": "1"}, {"a": "2"}]


def test_bad_lines_are_named_by_number_the_first_few_at_once(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n[1]\n"\xff"\n{"a": "\xff"}\n' + b"x\n" * 9)
    text = error_of(path)
    assert "must hold one JSON object a line; line 2: " in text
    assert "line 4: is a list, not an object" in text
    assert "line 5: is not UTF-8" in text and "line 6: is not UTF-8" in text
    assert "line 7" in text and "line 8" not in text


def test_a_line_nested_without_end_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("[" * 200_000 + "\n")
    assert "line 1: " in error_of(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("d.csv", "a,b\n1\n", "line 2 must have 2 fields, as the header; it has another number"),
        ("d.csv", "a,b\n1,2,3\n", "line 2 must have 2 fields"),
        ("d.csv", "a,a\n1,2\n", "must start with a line of different column names; got a, a"),
        ("d.csv", "", "must start with a line of different column names; got an empty file"),
        ("d.csv", 'a\n"1" 2\n', "is not valid CSV"),
        ("d.csv", "a\n\udcff\n", "must be UTF-8"),
        ("d.csv", "a\n", "must hold at least one row; it holds none"),
        ("d.jsonl", "", "must hold at least one row; it holds none"),
        ("d.json", "[1]", "must hold a list of JSON objects; item 1 is a int"),
        ("d.json", "[1", "is not valid JSON"),
        ("d.parquet", "", "data files end in .jsonl, .ndjson, .json, .csv, .tsv; got"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert part in error_of(tmp_path / name)


@pytest.mark.parametrize("source", ["no.jsonl", "./no", "/no/such/file.csv", "a/b/c"])
def test_missing_files(source: str) -> None:
    assert f"data file {source} does not exist" in error_of(source)


def test_bundled_data() -> None:
    rows = load_rows("bundled:word-problems", "train", 5, ANY)
    assert rows == [problem.row() for problem in make_problems("train", 5)]
    assert "got 'bundled:word-problem'. Did you mean 'bundled:word-problems'?" in error_of("bundled:word-problem")


def test_a_hub_data_set_that_cannot_be_reached_is_one_line() -> None:
    assert "data set nobody/nothing cannot be loaded: " in error_of("nobody/nothing")


def test_a_hub_data_set_with_and_without_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(source: str, subset: str | None, split: str, revision: str | None) -> Any:
        asked.append((source, subset, split, revision))
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {splits}.')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = DataConfig(train="openai/gsm8k", subset="main", revision="abc", train_size=4, test_size=2)
    splits = ["train", "test"]
    rows = load_splits(cfg)
    assert rows == {"train": ROWS[:4], "test": ROWS[:2]}
    assert asked == [("openai/gsm8k", "main", split, "abc") for split in ("train", "test")]
    splits = ["train"]
    assert load_splits(cfg) == {"train": ROWS[:4]}
    splits = ["else"]
    with pytest.raises(UserError, match="it has no split 'train'"):
        load_splits(cfg)


def test_fingerprint_follows_the_content_of_a_file(tmp_path: Path) -> None:
    path = Path(json_lines(tmp_path))
    before = fingerprint(path)
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    assert fingerprint(path) == fingerprint(copy) == before
    json_lines(tmp_path, ROWS[:3])
    assert fingerprint(path) != before


def test_splits_of_files(tmp_path: Path) -> None:
    path, other = json_lines(tmp_path), json_lines(tmp_path, ROWS[::-1], "e.jsonl")
    assert load_splits(DataConfig(train=path)) == {"train": ROWS}
    rows = load_splits(DataConfig(train=path, test=other, validation=other, train_size=2, test_size=3, validation_size=4))
    assert rows == {"train": ROWS[:2], "test": ROWS[::-1][:3], "validation": ROWS[::-1][:4]}


def test_validation_from_the_end_of_train(tmp_path: Path) -> None:
    path = json_lines(tmp_path)
    rows = load_splits(DataConfig(train=path, validation_from_train=3, train_size=5))
    assert rows == {"train": ROWS[:5], "validation": ROWS[-3:]}
    with pytest.raises(UserError, match="must be less than the 10 rows"):
        load_splits(DataConfig(train=path, validation_from_train=10))
    with pytest.raises(UserError, match="not both"):
        load_splits(DataConfig(train=path, validation=path, validation_from_train=1))
    rows = load_splits(DataConfig(train="bundled:word-problems", train_size=20, validation_from_train=5, test_size=5))
    assert {name: len(split) for name, split in rows.items()} == {"train": 20, "validation": 5, "test": 5}


def test_sorted_files_are_shuffled_before_any_rows_are_taken(tmp_path: Path) -> None:
    path = json_lines(tmp_path, [{"text": str(n), "label": int(n >= 50)} for n in range(100)])
    cut = DataConfig(train=path, test=path, train_size=30, test_size=20, validation_from_train=20, shuffle_seed=3)
    rows = load_splits(cut)
    assert rows == load_splits(cut) and rows["train"] != load_splits(dataclasses.replace(cut, shuffle_seed=4))["train"]
    for name, size in {"train": 30, "test": 20, "validation": 20}.items():
        assert len(rows[name]) == size and {row["label"] for row in rows[name]} == {0, 1}, name
    kept = {row["text"] for row in rows["train"]}
    assert len(kept) == 30 and not kept & {row["text"] for row in rows["validation"]}
    everything = load_splits(dataclasses.replace(cut, train_size=None, test_size=None))
    assert len(everything["train"]) == 80 and everything["train"][:30] == rows["train"]
    assert {row["text"] for row in everything["test"]} == {str(n) for n in range(100)}


def test_build(tmp_path: Path) -> None:
    path = json_lines(tmp_path, [*ROWS, {"question": "x" * 100, "answer": "1"}])
    bundle = build(config(train=path, test=path, validation_from_train=2, max_length=60), byte_level())
    assert (len(bundle.train), len(bundle.test or ()), len(bundle.validation or ())) == (9, 10, 1)
    assert bundle.train_rows == ROWS[:9] and len(bundle.test_rows) == 11
    assert bundle.reports["test"].dropped == 1
    lines = bundle.summary(config(max_length=60).data)
    assert len(lines) == 3 and any("1 dropped, longer than 60 tokens" in line for line in lines)


def test_build_names_the_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"question": ["q"], "answer": "1"}, {"question": "a"}, ROWS[3], {"question": "", "answer": None}]
    with pytest.raises(UserError) as caught:
        build(config(train=json_lines(tmp_path, rows)), byte_level())
    assert "row 3: question must be text that is not empty; got ['q']" in str(caught.value)
    assert "row 4: answer must be text that is not empty; got None" in str(caught.value)


def test_rows_with_an_empty_text_are_left_out_and_counted(tmp_path: Path) -> None:
    """As other tools do: published data sets have some. The rest keep their order; nothing else is left out."""
    blank = [{"question": "q", "answer": ""}, {"question": "q", "answer": " \n"}, {"question": "", "answer": "1"}]
    rows = [blank[0], *ROWS[:4], blank[1], blank[2], *ROWS[4:]]
    path, test = json_lines(tmp_path, rows), json_lines(tmp_path, [*ROWS[:2], blank[0]], "t.jsonl")
    settings = config(train=path, test=test, validation_from_train=3)
    bundle = build(settings, byte_level())
    assert bundle.train_rows == ROWS[:7] and bundle.test_rows == ROWS[:2] and bundle.validation_rows == ROWS[7:]
    assert (len(bundle.train), len(bundle.validation or ()), len(bundle.test or ())) == (7, 3, 2)
    assert (bundle.reports["train"].rows, bundle.reports["train"].empty) == (10, {"answer": 2, "question": 1})
    lines = bundle.summary(settings.data)
    assert lines[0].endswith("; 2 left out, answer empty; 1 left out, question empty")
    assert "left out" not in lines[1] and lines[2].endswith("; 1 left out, answer empty")
    again = build(settings, byte_level())
    assert [again.train[i] for i in range(7)] == [bundle.train[i] for i in range(7)]


def test_data_of_which_no_row_is_left_are_refused(tmp_path: Path) -> None:
    path = json_lines(tmp_path, [{"question": "q", "answer": ""}] * 3)
    with pytest.raises(UserError, match=r"d.jsonl has no row that can be used: answer is empty in all of them \(3\)"):
        build(config(train=path), byte_level())


def test_build_refuses_a_length_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.max_length must leave at least one training example; 3 leaves none of 10"):
        build(config(train=json_lines(tmp_path), max_length=3), byte_level())


def test_calibration_rows_are_different_examples_fixed_by_the_seed(tmp_path: Path) -> None:
    train = build(config(train=json_lines(tmp_path)), byte_level()).train
    chosen = calibration_rows(train, 6, seed=1)
    assert len(set(chosen)) == 6 and set(chosen) <= set(range(10))
    assert calibration_rows(train, 6, seed=1) == chosen != calibration_rows(train, 6, seed=2)
    assert sorted(calibration_rows(train, 99, seed=1)) == list(range(10))


def test_a_column_that_comes_up_late_is_read_in_training_and_in_what_is_measured(tmp_path: Path) -> None:
    """JSON Lines leave out what is empty, here for 150 rows; nothing depends on which rows stand together."""
    rows = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(160)]
    rows[150]["input"] = "loudly"
    path = json_lines(tmp_path, rows)
    bundle = build(config(train=path, test=path, validation=path, template="alpaca", max_length=400), byte_level())
    for examples in (bundle.test_examples, bundle.validation_examples):
        assert [n for n, example in enumerate(examples) if "### Input:\nloudly" in example.prompt] == [150]
    assert "### Input:\nloudly" in byte_level().decode(bundle.train[150]["input_ids"])
