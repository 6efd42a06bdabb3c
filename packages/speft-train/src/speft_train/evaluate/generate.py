"""Greedy generation in batches, on the model as it stands: whatever is attached to it or applied takes part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..data.collate import left_padded
from ..data.templates import after_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: int | None = None,
    description: str = "generating",
    progress: bool = True,
) -> list[str]:
    """The model's answer to each prompt (token ids), in the order given, up to the first token that ends one: `stop` or those
    of `end_ids`. Longest prompts run first and with their like.
    """
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    ends = end_ids(model, tokenizer, stop)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad_id,
    )
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    answers = [""] * len(prompts)
    with (
        _evaluating(model, settings),
        torch.no_grad(),
        tqdm(total=len(prompts), desc=description, unit=" answers", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            ids, mask = left_padded([prompts[place] for place in places], pad_id)
            made: Any = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            for place, tokens in zip(places, made[:, ids.shape[1] :].tolist(), strict=True):
                last = next((at for at, token in enumerate(tokens) if token in (ends or ())), len(tokens))
                answers[place] = tokenizer.decode(tokens[: last + 1], skip_special_tokens=True)
            bar.update(len(places))
    return answers


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: int | None = None) -> list[int] | None:
    """Every token that ends an answer, by the tokenizer and by the model's own generation settings (end of turn), and `stop`."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [stop, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None}) or None


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the tokenizer's chat template closes a turn of the assistant; None where it uses none.

    Base models come with chat templates too, and with an end-of-text token that these never write: what was trained on
    such turns would go on after them.
    """
    marked = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {*marked, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    ids: Any = tokenizer(after_turn(tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return next((token for token in ids if token in special), None)


@contextmanager
def _evaluating(model: PreTrainedModel, settings: Any) -> Iterator[None]:
    """Eval mode, the cache on, and none of the checkpoint's sampling settings; all as before on leaving."""
    training, own, cache = model.training, model.generation_config, getattr(model.config, "use_cache", None)
    model.eval()
    model.generation_config = settings
    if cache is not None:
        model.config.use_cache = True
    try:
        yield
    finally:
        model.generation_config = own
        if cache is not None:
            model.config.use_cache = cache
        model.train(training)
