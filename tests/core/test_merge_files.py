"""Merging from disk gives what merging in memory gives, in the memory of one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speft_core import AdapterConfig, SparseAdapter, SparseDelta, UserError
from speft_core.merge import merge
from speft_core.merge_files import merge_folders


def make(folder: Path, seed: int, tensors: int = 3, nnz: int = 50, dtype: torch.dtype = torch.float32) -> SparseAdapter:
    """A random adapter, saved."""
    draw = torch.Generator().manual_seed(seed)
    deltas, prints = {}, {}
    for i in range(tensors):
        numel = 4 * nnz
        indices = torch.randperm(numel, generator=draw)[:nnz].sort().values.int()
        deltas[f"layers.{i}.weight"] = SparseDelta(indices, torch.randn(nnz, generator=draw).to(dtype), (4, nnz))
        prints[f"layers.{i}.weight"] = {"shape": [4, nnz], "base_float32": f"{seed}{i}", "sample": f"s{i}"}
    adapter = SparseAdapter(
        deltas, {"score.weight": torch.full((2, 2), float(seed))}, AdapterConfig(base_model_name_or_path="acme/base"), prints
    )
    adapter.save(folder)
    return adapter


@pytest.mark.parametrize("method, density", [("sum", None), ("ties", 0.3), ("dare", 0.6), ("mean", None)])
def test_from_disk_is_as_in_memory(tmp_path: Path, method: str, density: float | None) -> None:
    sources = [make(tmp_path / "a", 1), make(tmp_path / "b", 2, tensors=4, dtype=torch.bfloat16)]
    rows = merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method, density=density)
    loaded, expected = SparseAdapter.load(tmp_path / "out"), merge(sources, method, density=density, names=["a", "b"])
    assert [r.name for r in rows] == list(expected.deltas) == list(loaded.deltas)
    for name, delta in expected.deltas.items():
        assert torch.equal(loaded.deltas[name].indices_K, delta.indices_K) and torch.equal(
            loaded.deltas[name].values_K, delta.values_K
        )
        assert loaded.deltas[name].values_K.dtype == delta.values_K.dtype
    assert loaded.config == expected.config and loaded.dense == {}
    assert loaded.fingerprint == {n: p | {"shape": list(expected.deltas[n].shape)} for n, p in expected.fingerprint.items()}
    expected.save(tmp_path / "memory")
    again = SparseAdapter.load(tmp_path / "memory")
    assert again.nnz == loaded.nnz and json.loads((tmp_path / "out/adapter_config.json").read_text())["nnz"] == loaded.nnz


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    make(tmp_path / "a", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("…")
    with pytest.raises(UserError, match="exists already"):
        merge_folders([tmp_path / "a"], tmp_path / "out")
    assert (tmp_path / "out" / "thesis").exists()
    merge_folders([tmp_path / "a"], tmp_path / "out", replace=True)
    assert SparseAdapter.load(tmp_path / "out").nnz == 150


def test_a_damaged_source_leaves_nothing_behind_and_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a", 1)
    make(tmp_path / "b", 2)
    weights = tmp_path / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-300])
    with pytest.raises(UserError, match=f"{tmp_path}/b is not a readable adapter"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="no adapter at"):
        merge_folders([tmp_path / "a", tmp_path / "c"], tmp_path / "out")


def test_a_tensor_is_sparse_or_dense_and_bases_may_go_unchecked(tmp_path: Path) -> None:
    make(tmp_path / "a", 1)
    other = make(tmp_path / "b", 2)
    other.fingerprint["layers.0.weight"]["sample"] = "other"
    other.save(tmp_path / "b")
    with pytest.raises(UserError, match="trained on different bases: layers.0.weight"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert len(merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", check_base=False)) == 3
    SparseAdapter({}, {"layers.1.weight": torch.ones(4, 50)}).save(tmp_path / "dense")
    with pytest.raises(UserError, match="layers.1.weight is sparse in one adapter and dense in another"):
        merge_folders([tmp_path / "a", tmp_path / "dense"], tmp_path / "never")
    assert not (tmp_path / "never").exists()
    merge_folders([tmp_path / "a", tmp_path / "dense"], tmp_path / "sparse", keep_dense=False)
    assert SparseAdapter.load(tmp_path / "sparse").dense == {}


def test_heads_alone_merge_with_figures_of_zero(tmp_path: Path) -> None:
    heads = [SparseAdapter({}, {f"score{n}.weight": torch.ones(2, 2)}, AdapterConfig()) for n in range(2)]
    for number, head in enumerate(heads):
        head.save(tmp_path / str(number))
    assert merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out") == []
    for merged in (merge(heads, names=["0", "1"]), SparseAdapter.load(tmp_path / "out")):
        record = merged.config.extra["merge"]
        assert record["sources"] == [{"name": "0", "nnz": 0}, {"name": "1", "nnz": 0}]
        assert record["figures"]["norms"] == [0.0, 0.0] and record["figures"]["merged_norm"] == record["figures"]["union"] == 0
        assert merged.nnz == 0 and merged.dense.keys() == {"score0.weight", "score1.weight"}


PEAK = """
import resource, sys, tracemalloc
from speft_core.merge_files import merge_folders
merge_folders(sys.argv[2:4], sys.argv[1] + "/warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_folders(sys.argv[4:6], sys.argv[1] + "/out", "ties", density=0.5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    peaks = {}
    for tensors in (8, 64):
        folders = []
        for seed in (1, 2):
            make(tmp_path / f"small{tensors}{seed}", seed, 1, 10)
            make(tmp_path / f"{tensors}{seed}", seed, tensors, 60_000)
            folders.append(str(tmp_path / f"{tensors}{seed}"))
        (tmp_path / f"t{tensors}").mkdir()
        warm = [str(tmp_path / f"small{tensors}{s}") for s in (1, 2)]
        run = [sys.executable, "-c", PEAK, str(tmp_path / f"t{tensors}"), *warm, *folders]
        peaks[tensors] = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout) * 1024
    # 64 tensors of two adapters are 40 MB on disk; the files are mapped, and mapped pages count while there is room.
    on_disk = sum((tmp_path / f"64{s}" / "adapter_model.safetensors").stat().st_size for s in (1, 2))
    assert on_disk > 36e6 and peaks[64] - peaks[8] < 1.1 * on_disk * 56 / 64 + 8e6, peaks
