"""The generator of word problems: right answers, disjoint splits, nothing trivial."""

from __future__ import annotations

import ast
import operator
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speft_core import UserError
from speft_train.config import PROBLEM_KINDS, WordProblemsConfig
from speft_train.data.phrases import NAMES, PHRASES, THINGS
from speft_train.data.word_problems import STEPS, Problem, is_test_number, make_problems
from speft_train.evaluate.numbers import reference_number, strict_number

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int:
    """An oracle apart from the generator's own arithmetic."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)
    return int(OPERATORS[type(node.op)](node.left.value, node.right.value))


def numbers_of(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\d+", text)}


def skeleton(question: str) -> list[str]:
    """Words of a question, its names, things and numbers blanked."""
    names = {word.lower() for side in NAMES.values() for word in side}
    things = {word for side in THINGS.values() for word in side}
    words = re.findall(r"[a-z]+|\d+|[.,;?]", question.lower())
    return ["N" if w in names else "O" if w in things else "#" if w.isdigit() else w for w in words]


def runs_of(problems: list[Problem], length: int) -> set[tuple[str, ...]]:
    words = [skeleton(problem.question) for problem in problems]
    return {tuple(row[i : i + length]) for row in words for i in range(len(row) - length + 1)}


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return make_problems("train", 4000)


@pytest.fixture(scope="module")
def test() -> list[Problem]:
    return make_problems("test", 1000)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_worked_answer_is_right_and_uses_the_numbers_of_its_question(split: str, seed: int) -> None:
    problems = make_problems(split, 400, WordProblemsConfig(seed=seed))
    assert {problem.kind for problem in problems} == set(PROBLEM_KINDS) == set(STEPS)
    for problem in problems:
        steps, final = problem.answer.split("\n")
        written = [step.split("=") for step in steps.split(", ")]
        assert all(calculate(left) == int(right) for left, right in written), problem
        assert all(right == re.split(r"[-+*]", left)[0] for (_, right), (left, _) in pairwise(written)), problem
        assert final == f"#### {written[-1][1]}"
        assert strict_number(problem.answer) == reference_number(problem.answer) == written[-1][1]
        assert numbers_of(problem.question) == set(problem.numbers)
        assert len(written) == len(STEPS[problem.kind])


def test_train_and_test_share_no_number(train: list[Problem], test: list[Problem]) -> None:
    seen = {number for problem in train for number in problem.numbers}
    held = {number for problem in test for number in problem.numbers}
    assert len(seen) > 30 and len(held) > 15
    assert not seen & held
    assert all(map(is_test_number, held)) and not any(map(is_test_number, seen))


def test_train_and_test_share_no_words_of_their_own(train: list[Problem], test: list[Problem]) -> None:
    """No sentence of one split, nor any run of five words of it, occurs in the other."""
    assert not set(NAMES["train"]) & set(NAMES["test"])
    assert not set(THINGS["train"]) & set(THINGS["test"])
    seen, held = runs_of(train, 5), runs_of(test, 5)
    assert len(seen) > 300 and len(held) > 100
    assert not seen & held


def test_every_phrase_is_used(train: list[Problem], test: list[Problem]) -> None:
    for side, problems in (("train", train), ("test", test)):
        written = sum(len(phrases[side]) for phrases in PHRASES.values())
        assert len({(p.kind, tuple(skeleton(p.question))) for p in problems}) == written


def test_validation_is_made_of_other_problems_than_train(train: list[Problem]) -> None:
    validation = make_problems("validation", 500)
    assert not {problem.question for problem in validation} & {problem.question for problem in train}
    assert not any(is_test_number(number) for problem in validation for number in problem.numbers)


def test_nothing_is_trivial_or_given_away(train: list[Problem], test: list[Problem]) -> None:
    for problem in train + test:
        answer = int(str(strict_number(problem.answer)))
        assert answer not in problem.numbers
        assert answer >= 2 and min(problem.numbers) >= 2
    for problems in (train, test):
        assert len({problem.question for problem in problems}) == len(problems)
        answers = [strict_number(problem.answer) for problem in problems]
        assert max(answers.count(answer) for answer in set(answers)) < len(answers) / 15, "no guess scores well"


def test_a_longer_list_starts_with_the_shorter_one_and_a_seed_gives_other_problems() -> None:
    assert make_problems("train", 50)[:20] == make_problems("train", 20)
    other = make_problems("train", 50, WordProblemsConfig(seed=1))
    assert not set(other) & set(make_problems("train", 50))


def test_seeds_do_not_mix_the_splits() -> None:
    held = {problem.question for seed in range(3) for problem in make_problems("test", 300, WordProblemsConfig(seed=seed))}
    seen = {problem.question for seed in range(3) for problem in make_problems("train", 300, WordProblemsConfig(seed=seed))}
    assert not held & seen


@given(st.integers(20, 500), st.integers(8, 30), st.lists(st.sampled_from(PROBLEM_KINDS), min_size=1, unique=True))
def test_knobs_bound_the_numbers(max_number: int, max_factor: int, kinds: list[str]) -> None:
    options = WordProblemsConfig(max_number=max_number, max_factor=max_factor, kinds=kinds)
    for problem in make_problems("train", 24, options) + make_problems("test", 24, options):
        assert problem.kind in kinds
        assert max(problem.numbers) <= max(max_number, max_factor)


def test_more_problems_than_there_are_is_an_error_not_a_hang() -> None:
    options = WordProblemsConfig(kinds=["multiply"], max_factor=8)
    with pytest.raises(UserError, match="has no more than .* different test problems"):
        make_problems("test", 100_000, options)


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="splits of bundled:word-problems are train, validation, test; got 'dev'"):
        make_problems("dev", 1)
