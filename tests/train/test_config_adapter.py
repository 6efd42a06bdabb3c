"""The adapter section: everything that core can do, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speft_core import UserError
from speft_train.config import METRICS, identity_dict, load_config, section_hash, to_yaml
from speft_train.memory import bytes_of
from speft_train.sweep_config import _axis

SMALL = "output_dir: out\nmodel: {name: m}\ndata: {train: d.jsonl}\nadapter: {budget: {k: 10}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value), "an error is one line"
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.metric=gradeint"], "weight_change or package.module:name; got 'gradeint'. Did you mean 'gradient'?"),
        (
            ["adapter.structure=row"],
            "must be entries, rows, columns, blocks:B (such as blocks:16) or N:M (such as 2:4); got 'row'",
        ),
        (["adapter.structure=blocks:1"], "must be entries, rows"),
        (['adapter.structure="4:2"'], "0 < N < M; got 4:2"),
        (["adapter.structure=rows", "adapter.min_per_layer=1"], "needs scope global and structure entries; got global, rows"),
        (["adapter.scope=local", "adapter.max_per_layer=0.5"], "needs scope global and structure entries; got local"),
        (["adapter.max_per_layer=1.5"], "a share must be at most 1.0"),
        (["adapter.metric=random", "adapter.structure=rows"], "random has no scores"),
        (["adapter.metric=weight_change"], "adapter.tuned_model: must name"),
        (["adapter.memory_limit=2 GiBB"], "one with a unit such as 512MiB or 2GB; got '2 GiBB'"),
        (["adapter.memory_limit=0"], "must be at least 1; got 0"),
        (["adapter.grasp.sign=2"], "must be one of -1, 1; got 2"),
        (["adapter.grasp.hessian=finit"], "must be one of auto, exact, finite; got 'finit'. Did you mean 'finite'?"),
        (["adapter.backward=natve"], "auto, compact, sampled, native, dense; got 'natve'. Did you mean 'native'?"),
        (["adapter.dynamic.interval=0"], "must be at least 1"),
        (["adapter.dynamic.policy=rescor"], "rescore, grow_and_drop; got 'rescor'. Did you mean 'rescore'?"),
        (["adapter.dynamic.final_budget=all"], "must be k, or a whole number; got 'all'"),
        (["adapter.dynamic.final_budget=k"], "needs dynamic.interval"),
        (["adapter.dynamic.interval=5", "adapter.metric=random"], "whose mask would never change"),
        (["adapter.dynamic.interval=5", "adapter.method=lora"], "needs method sparse; got lora"),
        (["model.head.weight_decay=-1"], "must be at least 0"),
    ],
)
def test_what_the_adapter_section_refuses(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in message(write(tmp_path, SMALL), *overrides)


def test_all_that_the_core_can_do_can_be_configured(tmp_path: Path) -> None:
    for setting in [
        *(f"adapter.metric={metric}" for metric in METRICS), "adapter.metric=mine.scores:best", "adapter.structure=blocks:16",
        'adapter.structure="2:4"', "adapter.min_per_layer=3", "adapter.max_per_layer=0.5", "adapter.memory_limit=1.5GiB",
        "adapter.memory_limit=100000", "adapter.backward=native", "adapter.keep_dtype=bfloat16", "adapter.grasp.step=1e-4",
    ]:  # fmt: skip
        cfg = load_config(write(tmp_path, SMALL), [setting])
        assert load_config(write(tmp_path, to_yaml(cfg))) == cfg, setting


def test_two_numbers_with_a_colon_are_text_as_the_documentation_writes_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as 124, in base 60."""
    assert load_config(write(tmp_path, SMALL), ["adapter.structure=2:4"]).adapter.structure == "2:4"
    assert load_config(write(tmp_path, SMALL.replace("adapter: {", "adapter: {structure: 2:4, "))).adapter.structure == "2:4"
    assert _axis("adapter.structure=2:4,rows,0x10") == ("adapter.structure", ["2:4", "rows", 16])


def test_a_key_that_came_later_does_not_make_a_finished_run_another(tmp_path: Path) -> None:
    """At its default it counts neither in a hash nor in the comparison with a folder's config."""
    plain = load_config(write(tmp_path, SMALL))
    tree = identity_dict(plain)
    assert "structure" not in tree["adapter"] and "dynamic" not in tree["adapter"] and "metric" in tree["adapter"]
    assert "weight_decay" not in tree["model"]["head"]
    written = load_config(write(tmp_path, SMALL), ["adapter.structure=entries", "adapter.dynamic.examples=1024"])
    assert section_hash(written) == section_hash(plain)
    for setting in ("adapter.structure=rows", "adapter.dynamic.interval=3", "adapter.memory_limit=5"):
        assert section_hash(load_config(write(tmp_path, SMALL), [setting])) != section_hash(plain)


@pytest.mark.parametrize(
    ("text", "count"), [(None, None), (7, 7), ("7B", 7), ("1kB", 1000), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("0B", 1)]
)
def test_amounts_of_memory(text: Any, count: int | None) -> None:
    assert bytes_of(text) == count
