"""Batches: padding, labels, and leaving out logits that nobody looks at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pico
from pico_tokenizers import byte_level
from speft_train.data.collate import Collator, collator, left_padded
from speft_train.data.tokens import IGNORED

PAD = 0


def example(prompt: int, answer: int, first: int = 5) -> dict[str, list[int]]:
    ids = [first + i for i in range(prompt + answer)]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5))
def test_padding_is_on_the_right_to_the_longest_and_neither_seen_nor_learnt(sizes: list[tuple[int, int]]) -> None:
    rows = [example(*size) for size in sizes]
    batch = Collator(PAD)(rows)
    longest = max(map(sum, sizes))
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].shape == (len(rows), longest) and batch[name].dtype == torch.int64
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][place, :length].tolist() == row["input_ids"]
        assert batch["labels"][place, :length].tolist() == row["labels"]
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][place, length:] == IGNORED).all()


@pytest.mark.parametrize("sizes", [[(5, 3), (3, 6), (7, 1)], [(1, 4), (6, 2)], [(0, 5), (3, 3)], [(4, 0), (2, 3)]])
@pytest.mark.parametrize("make", [pico.llama, pico.opt, pico.gpt2])
def test_trimmed_logits_give_the_same_loss_and_gradient(make: object, sizes: list[tuple[int, int]]) -> None:
    model = make()  # type: ignore[operator]
    rows = [example(*size) for size in sizes]
    found = []
    for trim in (False, True):
        model.zero_grad()
        output = model(**Collator(PAD, trim_logits=trim)(rows))
        output.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((output.loss.detach(), output.logits.shape[1], grads))
    (loss, length, grads), (trimmed_loss, trimmed_length, trimmed_grads) = found
    torch.testing.assert_close(trimmed_loss, loss)
    assert trimmed_length <= length
    if all(prompt > 1 for prompt, _ in sizes):
        assert trimmed_length < length
    for one, other in zip(grads, trimmed_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_a_batch_with_nothing_to_learn_still_goes_through_the_model() -> None:
    model = pico.llama()
    batch = Collator(PAD, trim_logits=True)([example(4, 0)])
    assert model(**batch).logits.shape[1] == batch["logits_to_keep"] == 1


def test_logits_are_trimmed_only_for_models_that_can() -> None:
    tokenizer = byte_level()
    assert collator(tokenizer) == Collator(pad_id=tokenizer.pad_token_id)
    assert collator(tokenizer, pico.llama()).trim_logits
    assert not collator(tokenizer, pico.bert()).trim_logits


def test_prompts_end_together() -> None:
    ids, mask = left_padded([[5], [6, 7, 8]], PAD)
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
