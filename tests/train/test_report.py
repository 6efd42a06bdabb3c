"""Figures and plots: which layer and module a name means, and tables that need no figure to be there."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest

from speft_train import memory, plots, results, tensorboard_log


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.weight", ("11", "self_attn.q_proj")),
        ("transformer.h.3.mlp.c_fc.weight", ("3", "mlp.c_fc")),
        ("bert.encoder.layer.0.attention.self.query.bias", ("0", "attention.self.query.bias")),
        ("model.norm.weight", ("-", "model.norm")),
        ("lm_head.weight", ("-", "lm_head")),
    ],
)
def test_place_of_a_parameter(name: str, place: tuple[str, str]) -> None:
    assert plots.place(name) == place


def test_density_table_orders_layers_by_number_and_leaves_gaps_empty() -> None:
    densities = {"l.10.a.weight": 0.3, "l.2.a.weight": 0.1, "l.2.b.weight": 0.2, "head.weight": 0.4}
    layers, modules, table = plots.density_table(densities)
    assert layers == ["2", "10", "-"] and modules == ["a", "b", "head"]
    assert table[0][:2] == [0.1, 0.2] and table[1][0] == 0.3 and table[2][2] == 0.4
    assert math.isnan(table[1][1]) and math.isnan(table[0][2])


def test_plots_are_png_files_and_nothing_is_drawn_from_nothing(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert plots.loss_curve(tmp_path / "loss.png", history)
    assert plots.density_map(tmp_path / "density.png", {"l.0.a.weight": 0.5, "l.1.a.weight": 0.1})
    for name in ("loss.png", "density.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not plots.loss_curve(tmp_path / "none.png", [{"step": 3}])
    assert not plots.density_map(tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()


FOUND: dict[str, Any] = {
    "base": None, "adapted": None, "trainable_parameters": 50, "total_parameters": 1000, "adapter_bytes": 170,
    "saliency_seconds": None, "train_seconds": 1.5, "peak_memory_bytes": 2**21, "steps": 3, "global_batch_size": 8,
    "history": [],
}  # fmt: skip


def test_tables_hold_what_there_is() -> None:
    assert results.figure_rows(FOUND) == []
    facts = dict(results.fact_rows(FOUND))
    assert facts["trained parameters"] == "50 (5.000% of 1,000)"
    assert facts["adapter"] == "170 bytes (3.40 a parameter)"
    assert "saliency" not in facts and "training loss" not in facts
    found = {**FOUND, "base": {"exact_match": 0.25}, "adapted": {"exact_match": 0.5, "count": 8}}
    rows = results.figure_rows(found)
    assert rows == [("exact match (number after ####)", "0.2500", "0.5000"), ("test examples", "-", "8")]


def test_event_files_are_what_tensorboard_reads(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    log = tensorboard_log.EventFile(tmp_path / "tb")
    log.scalars(1, {"train/loss": 2.5})
    log.scalars(2, {"train/loss": 1.5, "train/learning_rate": 0.125})
    (file,) = (tmp_path / "tb").iterdir()
    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(file)).Load()]
    log.close()
    assert events[0].file_version == "brain.Event:2"
    assert [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[1:]] == [
        (1, {"train/loss": 2.5}),
        (2, {"train/loss": 1.5, "train/learning_rate": 0.125}),
    ]


def test_peak_memory_grows_with_use() -> None:
    gc.collect()  # what earlier tests left would be given back meanwhile
    memory.reset_peak()
    before = memory.peak_bytes()
    block = bytearray(256 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    assert memory.peak_bytes() - before > 128 << 20
