"""Masks of rows, columns, blocks and N:M: against a plain oracle, within the budget, the same under any memory limit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pico
import speft_core as sc

STRUCTURES = ["rows", "columns", "blocks:4", "blocks:3", "2:4", "1:3", "3:5"]
Unit = tuple[float, int, int, list[int]]


def units_of(structure: str, number: int, scores: torch.Tensor) -> Iterator[Unit]:
    """(−score, tensor, unit, flat indices of its entries), by loops."""
    rows, columns = scores.shape
    place = torch.arange(rows * columns).view(rows, columns)
    if structure == "rows":
        groups = [place[r] for r in range(rows)]
    elif structure == "columns":
        groups = [place[:, c] for c in range(columns)]
    elif structure.startswith("blocks:"):
        b = int(structure[7:])
        groups = [place[r : r + b, c : c + b].reshape(-1) for r in range(0, rows, b) for c in range(0, columns, b)]
    else:
        n, m = (int(x) for x in structure.split(":"))
        groups = []
        for r in range(rows):
            for c in range(0, columns, m):
                group = place[r, c : c + m]
                best = scores.view(-1)[group].sort(descending=True, stable=True).indices[:n]
                groups.append(group[best])
    for unit, group in enumerate(groups):
        yield -float(scores.view(-1)[group].double().sum()), number, unit, sorted(group.tolist())


def chosen_by_force(structure: str, scores: dict[str, torch.Tensor], k: int) -> dict[str, list[int]]:
    units = sorted(u for number, t in enumerate(scores.values()) for u in units_of(structure, number, t))
    found: dict[str, list[int]] = {n: [] for n in scores}
    for _, number, _, entries in units:
        if len(entries) > k:
            break
        k -= len(entries)
        found[list(scores)[number]] += entries
    return {n: sorted(i) for n, i in found.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("k", [60, 333])
def test_equals_the_oracle_under_any_memory_limit(structure: str, k: int) -> None:
    model = pico.llama()
    batches = [pico.batch(model, seed=s) for s in range(2)]
    scores = sc.saliency_scores(model, batches)
    mask = sc.find_mask(model, batches, budget=sc.Budget(k=k), structure=structure)
    assert {n: i.tolist() for n, i in mask.indices.items()} == chosen_by_force(structure, scores, k)
    assert 0 < mask.nnz <= k
    assert mask == sc.find_mask(model, batches, budget=sc.Budget(k=k), structure=structure, memory_limit=4000)
    assert mask.made["structure"] == structure


@pytest.mark.parametrize("structure", STRUCTURES)
def test_local_scope_spends_each_tensors_share(structure: str) -> None:
    model = pico.bert()
    batches = [pico.batch(model)]
    scores = sc.saliency_scores(model, batches)
    mask = sc.find_mask(model, batches, budget=sc.Budget(density=0.3, of="targets"), structure=structure, scope="local")
    for name, indices in mask.indices.items():
        share = round(0.3 * scores[name].numel())
        possible = [chosen_by_force(structure, {name: scores[name]}, share + extra)[name] for extra in (-1, 0, 1)]
        assert indices.tolist() in possible
        assert indices.numel() > 0


@pytest.mark.parametrize("structure", ["2:4", "1:3", "3:5"])
def test_a_full_budget_of_n_of_m_fills_every_group(structure: str) -> None:
    n, m = (int(x) for x in structure.split(":"))
    model = pico.llama()
    k = sum(p.numel() for name, p in model.named_parameters() if "gate_proj" in name)
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=k), targets=["gate_proj"], structure=structure)
    for name, indices in mask.indices.items():
        rows, columns = mask.shapes[name]
        kept = torch.zeros(rows * columns).index_fill(0, indices.long(), 1.0).view(rows, columns)
        padded = torch.nn.functional.pad(kept, (0, -columns % m)).view(rows, -1, m).sum(-1)
        assert float(padded.max()) == n
        assert bool((padded[:, : columns // m] == n).all())


def test_fused_and_transposed_weights_are_matrices_too() -> None:
    model = pico.gpt2()
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=200), structure="columns")
    for name, indices in mask.indices.items():
        rows, columns = mask.shapes[name]
        assert indices.numel() % rows == 0
        assert torch.equal(torch.bincount(indices.long() % columns, minlength=columns).unique(), torch.tensor([0, rows])) or (
            indices.numel() == 0
        )


def test_the_adapter_format_is_the_same(tmp_path: object) -> None:
    model = pico.llama()
    mask = sc.find_mask(model, metric="magnitude", budget=sc.Budget(k=300), structure="blocks:4")
    tuner = sc.attach(model, mask)
    model(**pico.batch(model)).loss.backward()
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()
    adapter = tuner.adapter()
    adapter.save(f"{tmp_path}/adapter")
    assert sc.SparseAdapter.load(f"{tmp_path}/adapter").nnz == mask.nnz


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"structure": "4:2"}, "structure must be"),
        ({"structure": "blocks:1"}, "structure must be"),
        ({"structure": "rows", "budget": sc.Budget(k=3)}, "at least one whole unit"),
        ({"structure": "rows", "targets": ["input_layernorm"]}, "leave it out of the targets"),
    ],
)
def test_mistakes(arguments: dict, rule: str) -> None:
    with pytest.raises(sc.UserError, match=rule):
        sc.find_mask(pico.llama(), metric="magnitude", **{"budget": sc.Budget(k=16), **arguments})
