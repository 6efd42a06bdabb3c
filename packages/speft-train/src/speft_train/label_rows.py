"""The loss of a causal model from the rows that have a label, and no others.

With completion-only labels most positions are prompt or padding. Their logits are never looked at, yet the head
multiplies each by the whole vocabulary (49,152 x 576 for SmolLM2: a fifth of the model). Here the head sees only the
labelled rows, whatever comes after it (soft-capping, scaling) included. The loss is the same sum over the same rows.

Shape suffixes: B examples, T tokens, N labelled rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

IGNORED = -100


def supports(model: nn.Module) -> str | None:
    """None when this model's loss can be computed so; otherwise why not."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    inner = unwrap(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        return "it has no output embeddings"
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    kind = getattr(inner, "loss_type", None) or ("ForCausalLM" if type(inner).__name__ in CAUSAL.values() else "")
    if LOSS_MAPPING.get(kind) is not ForCausalLMLoss:
        return "its loss is not the next-token loss of transformers"
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    assert isinstance(inner, nn.Module)
    return inner


@contextmanager
def _head_sees(head: nn.Module, rows_BT: torch.Tensor) -> Iterator[None]:
    """Within it `head` is given the chosen rows only, as one example of N tokens."""

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH = args[0]
        assert hidden_BTH.shape[:2] == rows_BT.shape, "the head is not given every position"
        return (hidden_BTH[rows_BT].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(choose, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def next_token_loss(
    model: nn.Module, inner: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The loss of `model(**inputs)` with its labels: a mean over the labelled rows, or their sum / num_items.

    model: what is called (an engine or the model itself). inner: the transformers model in it, which has the head.
    """
    labels_BT = inputs["labels"]
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    rows_BT = next_BT != IGNORED
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    head = inner.get_output_embeddings()  # type: ignore[operator]
    with _head_sees(head, rows_BT):
        logits_1NV = model(**rest, use_cache=False).logits
    loss: torch.Tensor = inner.loss_function(  # type: ignore[operator]
        logits=logits_1NV,
        labels=None,
        shift_labels=next_BT[rows_BT],
        vocab_size=logits_1NV.shape[-1],
        num_items_in_batch=num_items,
    )
    return loss
