"""Activation checkpointing in a saliency pass: layers that compute again in backward, so that a pass takes what a step of training takes.

transformers checkpoints a layer only in training mode, which would turn dropout on. A pass computes in evaluation mode, so it
checkpoints the layers itself: those on which the user has turned it on (`model.gradient_checkpointing_enable()`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..partitioned import Recompute


@contextmanager
def recomputing(model: nn.Module, again: Recompute) -> Iterator[None]:
    """While open, layers with activation checkpointing turned on keep their input alone for backward. The sums keep their bits.

    again: a context for each second forward (partitioned.gathering).
    """
    layers = [m for m in model.modules() if _is_checkpointed(m)]
    own = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.forward = partial(_checkpointed, layer.forward, again)
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether this is a layer of transformers (GradientCheckpointingLayer) whose checkpointing is on."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return bool(getattr(module, "gradient_checkpointing", False)) and "GradientCheckpointingLayer" in kinds


def _checkpointed(forward: Callable[..., Any], again: Recompute, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tuple(map(_no_cache, args)), {name: _no_cache(value) for name, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    layer = partial(forward, **kwargs)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()))


def _no_cache(value: Any) -> Any:
    """A layer that runs twice would write twice into a cache of keys and values; it goes without."""
    return None if hasattr(value, "get_seq_length") else value
