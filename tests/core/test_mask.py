"""Budgets, and masks as files: what is saved comes back, what is damaged or hostile is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import pico
import speft_core as sc
from speft_core import gaps


def example() -> sc.SparsityMask:
    return sc.find_mask(pico.llama(), metric="magnitude", budget=sc.Budget(k=100), seed=4)


def test_save_and_load_give_the_same_bits_and_origin(tmp_path: Path) -> None:
    mask = example()
    mask.save(tmp_path / "deep" / "mask.safetensors")
    loaded = sc.SparsityMask.load(tmp_path / "deep" / "mask.safetensors")
    assert loaded == mask
    assert loaded.made == mask.made
    assert loaded.names == mask.names
    assert loaded.nnz == 100
    assert all(i.dtype == torch.int32 for i in loaded.indices.values())


def test_empty_and_full_tensors_survive(tmp_path: Path) -> None:
    mask = sc.SparsityMask({"none": torch.empty(0, dtype=torch.int32), "all": torch.arange(6)}, {"none": (3,), "all": (2, 3)})
    mask.save(tmp_path / "m")
    assert sc.SparsityMask.load(tmp_path / "m") == mask
    assert mask.densities() == {"none": 0.0, "all": 1.0}
    assert (mask.nnz, mask.numel) == (6, 9)


def test_equality_looks_at_bits_alone() -> None:
    one = sc.SparsityMask({"a": torch.tensor([1, 2])}, {"a": (4,)}, {"metric": "x"})
    assert one == sc.SparsityMask({"a": torch.tensor([1, 2])}, {"a": (4,)})
    assert one != sc.SparsityMask({"a": torch.tensor([1, 3])}, {"a": (4,)})
    assert one != sc.SparsityMask({"a": torch.tensor([1, 2])}, {"a": (2, 2)})
    assert one != "mask"


@pytest.mark.parametrize(("indices", "rule"), [([2, 1], "sorted"), ([1, 1], "sorted"), ([-1], r"\[0, 4\)"), ([4], r"\[0, 4\)")])
def test_masks_of_ones_own_are_checked(indices: list[int], rule: str) -> None:
    with pytest.raises(sc.UserError, match=rule):
        sc.SparsityMask({"a": torch.tensor(indices)}, {"a": (4,)})


def test_names_without_a_shape() -> None:
    with pytest.raises(sc.UserError, match="'b' has only one"):
        sc.SparsityMask({"a": torch.tensor([1])}, {"a": (4,), "b": (2,)})


def write(path: Path, **changes: Any) -> None:
    """A valid mask file of one tensor, or one with some of its parts changed."""
    tensors = {"a.gaps": gaps.encode(torch.tensor([1, 3], dtype=torch.int32))}
    record: dict[str, Any] = {"version": 1, "made": {}, "tensors": {"a": {"shape": [4], "count": 2}}}
    record |= {k: v for k, v in changes.items() if k not in ("tensor", "metadata")}
    tensors |= changes.get("tensor", {})
    metadata = changes.get("metadata") or {"speft_mask": json.dumps({k: v for k, v in record.items() if v is not None})}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


HOSTILE: list[dict[str, Any]] = [
    {"metadata": {"format": "pt"}},
    {"metadata": {"speft_mask": "{"}},
    {"metadata": {"speft_mask": "[]"}},
    {"metadata": {"speft_mask": "[" * 100_000}},
    {"version": 2},
    {"version": "one"},
    {"version": None},
    {"made": 7},
    {"made": None},
    {"tensors": []},
    {"tensors": None},
    {"tensors": {"a": {"shape": [4], "count": 3}}},
    {"tensors": {"a": {"shape": [4], "count": -1}}},
    {"tensors": {"a": {"shape": [4], "count": 10**15}}},
    {"tensors": {"a": {"shape": [2], "count": 2}}},
    {"tensors": {"a": {"shape": "x", "count": 2}}},
    {"tensors": {"b": {"shape": [4], "count": 2}}},
    {"tensors": {"a": 7}},
    {"tensor": {"a.gaps": torch.tensor([1, 255, 255], dtype=torch.uint8)}},
    {"tensor": {"a.gaps": torch.ones(3)}},
]


def test_the_file_that_hostile_ones_are_made_of_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "m")
    assert sc.SparsityMask.load(tmp_path / "m").indices["a"].tolist() == [1, 3]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_hostile_files_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "m", **changes)
    with pytest.raises(sc.UserError) as caught:
        sc.SparsityMask.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    example().save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for size in (0, 4, 9, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(sc.UserError, match="cut"):
            sc.SparsityMask.load(tmp_path / "cut")
    with pytest.raises(sc.UserError, match="no mask at"):
        sc.SparsityMask.load(tmp_path / "nowhere")


def test_budgets() -> None:
    model = pico.llama()
    names = [n for n, _ in model.named_parameters() if "q_proj" in n or "v_proj" in n]
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if n in names]
    pool = sum(a * b for a, b in shapes)
    whole = sum(p.numel() for p in model.parameters())
    body = whole - model.get_input_embeddings().weight.numel()
    assert sc.Budget(k=7).resolve(model, names) == 7
    assert sc.Budget(density=0.01).resolve(model, names) == round(0.01 * whole)
    assert sc.Budget(density=0.02, of="body").resolve(model, names) == round(0.02 * body)
    assert sc.Budget(density=1.0, of="targets").resolve(model, names) == pool
    assert sc.Budget(like_lora_r=2).resolve(model, names) == sum(2 * (a + b) for a, b in shapes)


@pytest.mark.parametrize(
    "fields",
    [{}, {"k": 1, "density": 0.1}, {"k": 0}, {"k": True}, {"k": 1.5}, {"density": 0.0}, {"density": 1.1},
     {"density": float("nan")}, {"density": 0.1, "of": "everything"}, {"like_lora_r": 0}],
)  # fmt: skip
def test_bad_budgets(fields: dict[str, Any]) -> None:
    with pytest.raises(sc.UserError) as caught:
        sc.Budget(**fields)
    assert "\n" not in str(caught.value)


def test_budgets_that_do_not_fit() -> None:
    model = pico.llama()
    with pytest.raises(sc.UserError, match="must fit the targets"):
        sc.Budget(k=10**6).resolve(model, ["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(sc.UserError, match="keeps none"):
        sc.Budget(density=1e-9).resolve(model, ["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(sc.UserError, match="counts matrices"):
        sc.Budget(like_lora_r=4).resolve(model, ["model.norm.weight"])


def test_the_model_must_fit() -> None:
    mask = example()
    with pytest.raises(sc.UserError, match="has no parameter"):
        mask.check_model(pico.opt())
    with pytest.raises(sc.UserError, match="has shape"):
        mask.check_model(pico.llama(intermediate_size=24))


def test_indices_are_kept_in_the_form_that_files_and_compiled_code_have() -> None:
    wide = torch.tensor([[1, 0], [5, 0]])
    given = {"a": wide[:, 0], "b": torch.tensor([2, 3], dtype=torch.int32)}
    mask = sc.SparsityMask(given, {"a": (2, 3), "b": (4,)})
    assert given["a"].dtype == torch.int64 and mask.indices["b"] is given["b"]
    assert mask.indices["a"].dtype == torch.int32 and mask.indices["a"].is_contiguous() and mask.indices["a"].tolist() == [1, 5]
    assert mask == sc.SparsityMask({n: i.to(torch.int32) for n, i in given.items()}, mask.shapes)
    large = sc.SparsityMask({"a": torch.tensor([1], dtype=torch.int32)}, {"a": (2**16, 2**16)})
    assert large.indices["a"].dtype == torch.int64
    with pytest.raises(sc.UserError, match="must lie in"):
        sc.SparsityMask({"a": torch.tensor([2**32 + 1])}, {"a": (2, 3)})
