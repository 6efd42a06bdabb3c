"""Exact match of generated numbers: strict (the number after `####`) and flexible (the last number)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from speft_core.errors import UserError

from ..config import RunConfig
from ..data.templates import Rendered
from ..data.tokens import prompt_ids
from .generate import generate_greedy, turn_end
from .numbers import last_number, reference_number, strict_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Rendered],
    cfg: RunConfig,
    description: str = "answering",
    progress: bool = True,
) -> dict[str, Any]:
    """Generate an answer to every example (the first `evaluate.limit`) and compare its number with the example's.

    Returns exact_match and exact_match_last_number (shares of 1), count, seconds, and a few `examples` for the
    report, wrong ones first.
    """
    started = time.perf_counter()
    examples = examples[: cfg.evaluate.limit]
    if not examples:
        raise UserError("evaluate needs at least one test row; there is none: set data.test, or evaluate.enabled=false")
    wanted = references(examples)
    answers = generate_greedy(
        model,
        tokenizer,
        [prompt_ids(example, tokenizer) for example in examples],
        max_new_tokens=cfg.evaluate.max_new_tokens,
        batch_size=cfg.evaluate.batch_size,
        stop=turn_end(tokenizer) if cfg.data.template == "chat" else None,
        description=description,
        progress=progress,
    )
    strict = [strict_number(answer) == number for answer, number in zip(answers, wanted, strict=True)]
    flexible = [last_number(answer) == number for answer, number in zip(answers, wanted, strict=True)]
    shown = sorted(range(len(answers)), key=lambda place: (strict[place], place))[: cfg.evaluate.examples]
    return {
        "exact_match": sum(strict) / len(strict),
        "exact_match_last_number": sum(flexible) / len(flexible),
        "count": len(answers),
        "seconds": time.perf_counter() - started,
        "examples": [
            {
                "prompt": examples[place].prompt,
                "expected": examples[place].answer.strip(),
                "generated": answers[place].strip(),
                "correct": strict[place],
            }
            for place in shown
        ],
    }


def references(examples: Sequence[Rendered]) -> list[str]:
    """The number of each answer; UserError for one without."""
    wanted = [reference_number(example.answer) for example in examples]
    missing = next((place for place, number in enumerate(wanted) if number is None), None)
    if missing is not None:
        raise UserError(
            "exact match needs a number in every answer that is measured;"
            f" {' '.join(examples[missing].answer.split())[:60]!r} has none: set evaluate.generation=false"
        )
    return [number for number in wanted if number is not None]
