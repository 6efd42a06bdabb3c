"""F1 against scikit-learn's own words for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from speft_train.evaluate import metrics


def one_hot(classes: list[int], count: int) -> list[list[float]]:
    return [[float(place == chosen) for place in range(count)] for chosen in classes]


def f1(expected: list[int], predicted: list[int], count: int) -> float:
    return metrics.figures(expected, one_hot(predicted, count), regression=False)["f1"]


@given(st.integers(3, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), min_size=1))))
def test_f1_of_several_classes_is_the_mean_over_those_that_come_up(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = drawn
    expected, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    wanted = f1_score(expected, predicted, average="macro", zero_division=0.0)
    assert metrics.f1(expected, predicted, count) == pytest.approx(wanted)


@pytest.mark.parametrize("absent", [0, 1, 2, 3])
def test_an_absent_class_counts_the_same_whichever_it_is(absent: int) -> None:
    here = [label for label in range(4) if label != absent]
    assert f1(here * 2, here * 2, 4) == 1.0
    assert f1(here * 2, [here[0], here[1], here[1], *here], 4) == pytest.approx((1 + 4 / 5 + 2 / 3) / 3)


def test_two_of_many_classes_are_not_a_binary_task() -> None:
    expected, predicted = [0, 0, 1, 1], [0, 0, 0, 1]
    assert f1(expected, predicted, 5) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert f1(expected, predicted, 2) == pytest.approx(2 / 3), "GLUE's: of the second class alone"
    assert metrics.f1([0, 0], [0, 0], 2) == 0.0
