"""`bundled:word-problems`: seeded arithmetic word problems with worked answers, for runs that need no download.

    question  "Tom has 23 apples, buys 14 more and gives 9 to Anna. How many apples does Tom have now?"
    answer    "23+14=37, 37-9=28\\n#### 28"

Train and test share neither numbers nor words: every number in a test question is 1 modulo 3 and none in a training
question is; sentences, names and things come from separate lists (phrases.py). A model that scores on the test
problems has learnt to read the question and to calculate, not to recall. No answer equals a number of its question.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from speft_core.errors import UserError

from ..config import WordProblemsConfig
from .phrases import NAMES, PHRASES, THINGS

SPLITS = ("train", "validation", "test")
RESIDUE, MODULUS = 1, 3  # test numbers are RESIDUE modulo MODULUS, training numbers are the others
SIGNS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
STEPS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "add_add": "++",
    "add_subtract": "+-",
    "subtract_add": "-+",
    "multiply_add": "*+",
    "multiply_subtract": "*-",
}


@dataclass(frozen=True)
class Problem:
    """One problem, with what it was made of."""

    kind: str
    numbers: tuple[int, ...]
    question: str
    answer: str

    def row(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}


def is_test_number(number: int) -> bool:
    return number % MODULUS == RESIDUE


def make_problems(split: str, size: int, options: WordProblemsConfig | None = None) -> list[Problem]:
    """`size` different problems of a split, the kinds in turn. A longer list starts with the shorter one.

    Validation problems are made of the training words and numbers, and are never training problems.
    """
    options = options or WordProblemsConfig()
    if split not in SPLITS:
        raise UserError(f"splits of bundled:word-problems are {', '.join(SPLITS)}; got {split!r}")
    side = "test" if split == "test" else "train"
    generator = random.Random(f"{options.seed} {side}")
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < size:
        kind = options.kinds[len(problems) % len(options.kinds)]
        for _ in range(1000):
            problem = _draw(kind, side, generator, options)
            belongs = side == "test" or _is_validation(problem) == (split == "validation")
            if problem.question not in seen and belongs:
                break
        else:
            raise UserError(
                f"bundled:word-problems has no more than {len(problems)} different {split} problems of these kinds;"
                f" {size} were asked for: raise data.word_problems.max_number"
            )
        seen.add(problem.question)
        problems.append(problem)
    return problems


def _is_validation(problem: Problem) -> bool:
    """One training-side problem in sixteen is for validation, by its text, so that no list length or seed mixes the
    two.
    """
    return zlib.crc32(problem.question.encode()) % 16 == 0


def _draw(kind: str, side: str, generator: random.Random, options: WordProblemsConfig) -> Problem:
    numbers, results = _draw_numbers(STEPS[kind], side, generator, options)
    first, second = generator.sample(NAMES[side], 2)
    words = {"n": first, "m": second, "o": generator.choice(THINGS[side])}
    question = generator.choice(PHRASES[kind][side]).format(**words, **dict(zip("abc", numbers, strict=False)))
    return Problem(kind=kind, numbers=numbers, question=question, answer=_worked(STEPS[kind], numbers, results))


def _draw_numbers(
    signs: str, side: str, generator: random.Random, options: WordProblemsConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of a question and the result after each step."""
    factors = _pool(side, options.max_factor)
    others = _pool(side, options.max_number)
    while True:
        numbers = tuple(
            generator.choice(factors if signs[0] == "*" and place < 2 else others) for place in range(len(signs) + 1)
        )
        results = _calculate(signs, numbers)
        if min(results) >= 2 and results[-1] not in numbers:
            return numbers, results


def _pool(side: str, largest: int) -> list[int]:
    return [number for number in range(2, largest + 1) if is_test_number(number) == (side == "test")]


def _calculate(signs: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    results = []
    value = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = SIGNS[sign](value, number)
        results.append(value)
    return tuple(results)


def _worked(signs: str, numbers: tuple[int, ...], results: tuple[int, ...]) -> str:
    """ "23+14=37, 37-9=28" and the number after the marker."""
    before = (numbers[0], *results)
    steps = [f"{x}{sign}{y}={z}" for sign, x, y, z in zip(signs, before, numbers[1:], results, strict=False)]
    return ", ".join(steps) + f"\n#### {results[-1]}"
