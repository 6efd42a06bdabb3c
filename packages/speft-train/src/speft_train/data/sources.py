"""Rows of data from wherever they lie: JSON Lines, CSV, the Hub, or a generator. A row is a plain mapping."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from speft_core.errors import UserError, nearest

from ..config import DataConfig
from .word_problems import make_problems

WORD_PROBLEMS = "bundled:word-problems"
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
DEFAULT_SIZE = {"train": 2000, "validation": 200, "test": 200}

Rows = list[dict[str, Any]]


class NoSplitError(UserError):
    """A data set has no split of the name that was asked for."""


def load_rows(source: str, split: str, size: int | None, cfg: DataConfig) -> Rows:
    """The first `size` rows (all, if None) of a source; `split` matters for the Hub and for bundled data."""
    if source.startswith("bundled:"):
        return _bundled(source, split, size, cfg)
    kind = file_kind(source)
    if kind is None:
        rows = _from_hub(source, split, size, cfg)
    else:
        rows = list(islice(READERS[kind](Path(source).expanduser()), size))
    if not rows:
        raise UserError(f"{source} must hold at least one row; it holds none")
    return rows


def file_kind(source: str) -> str | None:
    """The ending that chooses the reader of a local file, or None for a Hub id."""
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    if ending in READERS:
        if not path.is_file():
            raise UserError(f"data file {source} does not exist")
        return ending
    if path.exists():
        raise UserError(f"data files end in {', '.join(READERS)}; got {source}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data file {source} does not exist")
    return None


def fingerprint(file: Path) -> str:
    """A hash of what a file holds: of its bytes, not of when it was written. Read once a process while its size, time and inode stay."""
    found = file.stat()
    return _hashed(file.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@functools.cache
def _hashed(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file, or of a file that is one JSON list. Bad lines are named by number, the first few
    at once.
    """
    bad: list[str] = []
    with path.open(encoding="utf-8-sig", newline="\n", errors="surrogateescape") as file:
        start = file.read(1)
        file.seek(0)
        if start == "[" and path.suffix.lower() == ".json":
            yield from _json_list(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row, problem = _json_object(line)
            if problem:
                bad.append(f"line {number}: {problem}")
                if len(bad) == 5:
                    break
            elif not bad:
                yield row
    if bad:
        raise UserError(f"{path} must hold one JSON object a line; {'; '.join(bad)}")


def _json_object(line: str) -> tuple[dict[str, Any], str]:
    try:
        row = json.loads(line)
        line.encode("utf-8")
    except UnicodeEncodeError:
        return {}, "is not UTF-8"
    except RecursionError:
        return {}, "is nested too deeply"
    except ValueError as error:
        return {}, getattr(error, "msg", str(error))
    return (row, "") if isinstance(row, dict) else ({}, f"is a {type(row).__name__}, not an object")


def _json_list(path: Path, text: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} must hold a list of JSON objects; item {place} is a {type(row).__name__}")
        yield row


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV file with a header line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLES[path.suffix.lower()], strict=True)
            header = reader.fieldnames or []
            if not header or len(set(header)) < len(header):
                listed = ", ".join(header) or "an empty file"
                raise UserError(f"{path} must start with a line of different column names; got {listed}")
            for row in reader:
                if None in row or None in row.values():
                    place = f"{path} line {reader.line_num}"
                    raise UserError(f"{place} must have {len(header)} fields, as the header; it has another number")
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8; byte {error.start} is not") from None
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from None


def _bundled(source: str, split: str, size: int | None, cfg: DataConfig) -> Rows:
    if source != WORD_PROBLEMS:
        hint = nearest(source, [WORD_PROBLEMS])
        raise UserError(f"bundled data are {WORD_PROBLEMS}; got {source!r}.{hint}".removesuffix("."))
    count = size if size is not None else DEFAULT_SIZE.get(split, 0)
    return [dict(problem.row()) for problem in make_problems(split, count, cfg.word_problems)]


def _from_hub(source: str, split: str, size: int | None, cfg: DataConfig) -> Rows:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data set {source} is on the Hub, which needs the package datasets: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(source, cfg.subset, split=split, revision=cfg.revision)
    except (OSError, ValueError, RuntimeError) as error:
        kind = NoSplitError if "Unknown split" in str(error) else UserError
        raise kind(f"data set {source} cannot be loaded: {_reason(error, cfg, split)}") from None
    return [dict(row) for row in (loaded if size is None else islice(loaded, size))]


def _reason(error: Exception, cfg: DataConfig, split: str) -> str:
    """What the datasets library says over many lines, in one."""
    name, text = type(error).__name__, str(error).strip() or type(error).__name__
    reasons = (
        (
            "DatasetNotFoundError" in name,
            "there is no such local file, nor such a data set on the Hub that you may read",
        ),
        (
            "Couldn't reach" in text or "Connect" in name or "Offline" in name,
            "the Hub cannot be reached, and it is not in the local cache",
        ),
        ("Unknown split" in text, f"it has no split {split!r}: {text.splitlines()[0]}"),
        (
            "Config name is missing" in text,
            "data.subset must name one of its configurations: " + " ".join(text.split()),
        ),
        (
            "BuilderConfig" in text and "not found" in text,
            f"it has no configuration {cfg.subset!r}: " + " ".join(text.split()),
        ),
        ("scripts are no longer supported" in text, "it needs code of its own to run, which is never done here"),
    )
    return next((words for holds, words in reasons if holds), text.splitlines()[0])


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    **dict.fromkeys(JSON_LINES, read_json_lines),
    **dict.fromkeys(TABLES, read_table),
}


def available_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Columns that any row has, in the order in which they come up: JSON Lines leave out what is empty, often for long."""
    return list(dict.fromkeys(column for row in rows for column in row))
