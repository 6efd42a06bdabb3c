"""The methods entry by entry, where parity with PEFT leaves a choice: ties, equal magnitudes, rounding down, and the draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_core.merge_methods import METHODS, Stack, _drawn, _largest


def stack(
    values: list[list[float]], present: list[list[int]] | None = None, weights: list[float] | None = None, name: str = "w"
) -> Stack:
    values_AU = torch.tensor(values)
    present_AU = torch.tensor(present).bool() if present is not None else torch.ones_like(values_AU, dtype=torch.bool)
    return Stack(name, values_AU * present_AU, present_AU, torch.tensor(weights or [1.0] * len(values)))


def kept(chosen_AU: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row_U).flatten().tolist() for row_U in chosen_AU]


def test_of_equal_magnitudes_the_first_are_kept_and_shares_are_rounded_down() -> None:
    given = stack([[1.0, -1.0, 1.0, 1.0, 0.5], [0.0, 2.0, 0.0, -3.0, 9.0]], [[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert kept(_largest(given, 0.5)) == [[0, 1], [3]]
    assert kept(_largest(given, 0.7)) == [[0, 1, 2], [1, 3]]
    assert kept(_largest(given, 1.0)) == [[0, 1, 2, 3, 4], [1, 2, 3]]
    assert kept(_largest(given, 0.1)) == [[], []]
    many = stack([[2.0, -2.0] * 50])  # more than a sort that is not stable leaves in their order
    assert kept(_largest(many, 0.3)) == [list(range(30))]


NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
WEIGHTS = st.sampled_from([-1.0, 0.5, 1.0, 2.0])


@given(st.lists(st.tuples(st.tuples(NUMBERS, NUMBERS, NUMBERS), WEIGHTS), min_size=1, max_size=4))
def test_each_method_does_to_an_entry_what_its_formula_says(rows: list[tuple[tuple[float, float, float], float]]) -> None:
    values, weights = [list(r) for r, _ in rows], [w for _, w in rows]
    given = stack(values, weights=weights)
    for name in ("sum", "weighted", "mean", "negate", "ties", "magnitude", "dare", "dare_ties"):
        if name == "mean" and sum(weights) == 0:
            continue
        found_U, kept_U = METHODS[name].function(given, 1.0, 0)
        assert kept_U.tolist() == [True] * 3
        for entry, found in enumerate(found_U.tolist()):
            column = [row[entry] for row in values]
            total = sum(w * v for w, v in zip(weights, column, strict=True))
            sign = 1.0 if sum(column) >= 0 else -1.0  # a draw counts as positive
            agreeing = [w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
            elected = sum(agreeing) / max(1, len(agreeing))
            expected = {"mean": total / (sum(weights) or 1.0), "negate": -total, "ties": elected, "dare_ties": elected}.get(name, total)
            assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_what_is_drawn_is_scaled_up_and_the_rest_is_gone(method: str) -> None:
    given = stack([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], [[1, 1, 1, 1, 1, 1, 0, 1]])
    found_U, kept_U = METHODS[method].function(given, 0.5, 3)
    (chosen,) = kept(_drawn(given, 0.5, 3))
    assert 0 < len(chosen) < 7 and 6 not in chosen
    assert kept_U.nonzero().flatten().tolist() == chosen
    assert found_U.tolist() == [2.0 * given.values_AU[0, u].item() if u in chosen else 0.0 for u in range(8)]


DRAWN = [[3, 7, 8, 9, 11, 14, 15, 19, 20], [1, 3, 5, 11, 13, 19]]
TWICE = [[3, 7, 8, 9, 11, 14, 15, 19, 20], [0, 3, 4, 6, 8, 14, 15, 18, 19, 21]]


def test_draws_are_those_of_every_version_and_machine() -> None:
    """Drawn once: others must agree, or a recorded merge could not be made again."""
    given = stack([[float(u) for u in range(24)]] * 2, [[1] * 24, [u % 2 for u in range(24)]])
    assert kept(_drawn(given, 0.4, 5)) == DRAWN
    assert kept(_drawn(stack([[float(u) for u in range(24)]] * 2), 0.4, 5)) == TWICE
    assert kept(_drawn(stack([[float(u) for u in range(24)]], name="v"), 0.4, 5)) != [DRAWN[0]]
    assert kept(_drawn(stack([[float(u) for u in range(24)]]), 0.4, 6)) != [DRAWN[0]]
    assert kept(_drawn(stack([[float(-u) for u in range(24)]]), 0.4, 5)) != [DRAWN[0]]
    doubled = Stack("w", given.values_AU.double(), given.present_AU, given.weights_A)
    assert kept(_drawn(doubled, 0.4, 5)) == DRAWN
    turned = Stack("w", given.values_AU.flip(0), given.present_AU.flip(0), given.weights_A)
    assert kept(_drawn(turned, 0.4, 5)) == DRAWN[::-1]
