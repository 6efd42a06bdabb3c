"""Random masks depend on (seed, tensor name) alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import speft_core as sc
from speft_core.adapter_files import MAX_BERNOULLI_NUMEL, draw
from speft_core.random_mask import bernoulli_indices, random_indices, split_evenly

# Drawn once with numpy 2.4; other versions and machines must agree, or saved adapters would mean other weights.
NAME = "model.layers.0.self_attn.q_proj.weight"
EXACT = [22, 96, 125, 217, 230, 237, 522, 603, 684, 740, 933, 956]
BERNOULLI = [1, 14, 40, 45, 56, 71, 201, 219, 290, 341, 351, 353, 360, 366, 388]
COMPLEMENT = [0, 1, 2, 3, 4, 6, 8]


def test_golden_values() -> None:
    assert random_indices(7, NAME, 1000, 12).tolist() == EXACT
    assert bernoulli_indices(7, NAME, 400, 0.03).tolist() == BERNOULLI
    assert random_indices(7, "dense", 9, 7).tolist() == COMPLEMENT


@pytest.mark.parametrize(("numel", "k"), [(1, 1), (10, 0), (10, 10), (1000, 500), (1000, 501), (5000, 3), (100_003, 50_000)])
def test_exactly_k_sorted_and_distinct(numel: int, k: int) -> None:
    indices = random_indices(3, "w", numel, k)
    assert indices.numel() == k
    assert indices.dtype == torch.int32
    assert bool((indices[1:] > indices[:-1]).all())
    assert k == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < numel)


def test_every_index_is_equally_likely() -> None:
    counts = torch.zeros(20)
    for seed in range(3000):
        counts[random_indices(seed, "w", 20, 5).long()] += 1
    assert float((counts - 750).abs().max()) < 5 * (3000 * 0.25 * 0.75) ** 0.5


def test_bernoulli_keeps_about_its_density() -> None:
    kept = bernoulli_indices(0, "w", 1_000_000, 0.01).numel()
    assert abs(kept - 10_000) < 5 * (1_000_000 * 0.01 * 0.99) ** 0.5


def test_names_and_seeds_differ_for_equal_shapes() -> None:
    draws = [random_indices(s, n, 10_000, 100).tolist() for s in (0, 1) for n in ("a", "b")]
    assert len({tuple(d) for d in draws}) == 4


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_order_of_tensors_and_save_and_load_do_not_matter(mode: str, tmp_path: Path) -> None:
    model, budget = pico.llama(), sc.Budget(density=0.05, of="targets")
    mask = sc.find_mask(model, metric="random", budget=budget, seed=5, random_mode=mode)
    names = list(reversed(mask.names))
    other = sc.find_mask(model, metric="random", budget=budget, seed=5, random_mode=mode, targets=names)
    assert mask == other
    assert mask.nnz > 0
    if mode == "exact":
        assert mask.nnz == budget.resolve(model, mask.names)
    mask.save(tmp_path / "mask.safetensors")
    assert sc.SparsityMask.load(tmp_path / "mask.safetensors") == mask
    assert sc.SparsityMask.load(tmp_path / "mask.safetensors").made == mask.made


def test_another_process_draws_the_same() -> None:
    script = "from speft_core.random_mask import random_indices as r; print(r(11, 'layer.weight', 12345, 17).tolist())"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(random_indices(11, "layer.weight", 12345, 17).tolist())


def test_shares_add_up_and_do_not_depend_on_order() -> None:
    numels = {"a": 7, "b": 7, "c": 86}
    for k in range(101):
        shares = split_evenly(k, numels)
        assert sum(shares.values()) == k
        assert all(0 <= shares[n] <= numels[n] for n in numels)
        assert split_evenly(k, dict(reversed(numels.items()))) == shares


@pytest.mark.parametrize(
    ("origin", "numel", "count", "rule"),
    [
        ({"mode": "fair"}, 100, 5, "random.mode must be exact or bernoulli, got 'fair'"),
        ({"mode": "bernoulli", "density": 0.5}, MAX_BERNOULLI_NUMEL + 1, 5, "w: a Bernoulli mask covers at most"),
        ({"mode": "bernoulli", "density": 0.5}, 10_000, 4000, "w: 4,000 values are no Bernoulli draw of density 0.5"),
        ({"mode": "bernoulli", "density": 0.0}, 10_000, 0, "no Bernoulli draw"),
        ({"mode": "bernoulli", "density": 1.5}, 10_000, 15_000, "no Bernoulli draw"),
    ],
)
def test_no_file_can_claim_a_draw_that_is_none(origin: dict[str, Any], numel: int, count: int, rule: str) -> None:
    with pytest.raises(sc.UserError, match=rule):
        draw({"seed": 3, **origin}, "w", numel, count)
    assert draw({"seed": 3}, "w", 100, 5).numel() == 5
