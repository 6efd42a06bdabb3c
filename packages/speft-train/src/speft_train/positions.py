"""How many tokens a model has positions for, and whether the data ask for more: told before its weights are loaded.

Rotary positions and ALiBi have no end. Tables do, learned (GPT-2, OPT) or not (GPT-J): past it the model fails, on a GPU by an
assertion that takes the process with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from speft_core.errors import UserError

from . import models

if TYPE_CHECKING:
    from .config import RunConfig
    from .context import Run
    from .measure import Split

_ENDS: dict[str, int | None] = {}  # a model's config -> what `_end` found: a sweep asks for each of its runs
MARGIN = 8  # rows that a table has more than there are positions (OPT's 2), or that hold none (RoBERTa's, up to the padding's)


def room(model: Any) -> int | None:
    """How many tokens of an example have a position; None where the config sets no end.

    RoBERTa and its kin count from the row after the padding's: of a table of 514 rows 512 are used. They alone give the
    table of positions a padding_idx.
    """
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        skipped = getattr(module, "padding_idx", None)
        if found is not None and name.endswith("position_embeddings") and skipped is not None:
            return found - skipped - 1
    return found


def has_table(model: Any, limit: int) -> bool:
    """Whether a model looks its positions up. Its table is known by its rows, for each architecture names it otherwise."""
    import torch

    words = model.get_input_embeddings()
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    learned = any(limit <= module.num_embeddings < limit + MARGIN for module in embeddings)
    return learned or any(buffer.dim() == 2 and len(buffer) == limit for buffer in model.buffers())


def check(run: Run, config: Any, measured: Sequence[Split]) -> None:
    """UserError where an example, or a prompt with what is generated after it, has more tokens than the model has positions.

    config: the model's, whose weights are not loaded yet. measured: what a causal model is to answer, if anything.
    """
    end, new = _end(run.cfg, config), run.cfg.evaluate.max_new_tokens
    if end is None:
        return
    example, prompt = _longest(run, measured)
    mistakes = []
    if example > end:
        mistakes.append(too_long(end, example))
    spare = end - prompt + 1  # the last token is not read again
    if prompt and spare < new:
        lower = f"lower it to {spare}, or " if spare > 0 else ""
        mistakes.append(
            f"evaluate.max_new_tokens must leave room for the prompt in the model's {end} positions; got {new}, and the longest"
            f" prompt has {prompt} tokens: {lower}set evaluate.generation=false"
        )
    if mistakes:
        raise UserError("; ".join(mistakes))


def _end(cfg: RunConfig, config: Any) -> int | None:
    """`room` of a model that looks positions up, else None. Asked first, without weights: most models have no table, and no prompt
    needs to be tokenized for them.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    key = config.to_json_string()
    if key not in _ENDS:
        model = models.meta_model(cfg)
        _ENDS[key] = room(model) if has_table(model, limit) else None
    return _ENDS[key]


def too_long(end: int, tokens: int) -> str:
    """What is wrong with an example of so many tokens."""
    return f"data.max_length must be at most the model's {end} positions; an example has {tokens} tokens"


def _longest(run: Run, measured: Sequence[Split]) -> tuple[int, int]:
    """(tokens of the longest example, tokens of the longest prompt that is answered: 0 where none is)."""
    from . import data
    from .evaluate.choices import spelled_out

    cfg, tokenizer = run.cfg, run.tokenizer
    longest, prompt = max(report.longest for report in run.data.reports.values()), 0
    for split in measured:
        if cfg.data.template == "multiple_choice":
            for row in split.rows[: cfg.evaluate.limit]:
                made, _ = spelled_out([row], tokenizer, cfg)
                longest = max(longest, *(len(example["input_ids"]) for example in made))
        elif cfg.evaluate.generation:
            for rendered in split.rendered[: cfg.evaluate.limit]:
                prompt = max(prompt, len(data.prompt_ids(rendered, tokenizer)))
    return longest, prompt
