"""A model whose weights the ranks keep in shards (ZeRO stage 3 on several ranks): loaded, evaluated and saved, never whole.

transformers reads a checkpoint tensor by tensor into a model without data. Each tensor is cut up as it arrives, so that a rank
holds its shards and one tensor more; names, dtypes, tied weights and conversions are transformers' own. Evaluation gathers one
layer after the other (speft_core.partitioned), so all ranks go through each forward together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from speft_core.partitioned import gathering, is_partitioned, whole
from speft_core.targets import parameter_shape

from . import engine

if TYPE_CHECKING:
    from .config import DeepspeedSection
    from .ranks import Ranks

ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"  # or transformers reads ahead, up to the whole checkpoint


def total(model: Any) -> int:
    """Scalars of a model, in shards or whole; tied ones once."""
    return sum(math.prod(parameter_shape(p)) for p in model.parameters())


@contextmanager
def loading(section: DeepspeedSection, world: int) -> Iterator[Callable[[Any], None]]:
    """Within it what `from_pretrained` loads is cut up; call what this yields once the rest of the model (a new head) is ready."""
    if not engine.shards_weights(section, world):
        yield lambda model: None
        return

    cut = engine.cutter(section)

    def arrived(_module: Any, _name: str, parameter: Any) -> None:
        if parameter is not None and getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta:
            rest([parameter])

    def rest(parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if not is_partitioned(parameter):
                parameter.data = parameter.data.contiguous()
                cut(parameter)

    before = os.environ.get(ONE_AT_A_TIME)
    os.environ[ONE_AT_A_TIME] = "1"
    hook = register_module_parameter_registration_hook(arrived)
    try:
        with _without_maps():
            yield lambda model: rest(model.parameters())
    finally:
        hook.remove()
        del os.environ[ONE_AT_A_TIME]
        if before is not None:
            os.environ[ONE_AT_A_TIME] = before


@contextmanager
def _without_maps() -> Iterator[None]:
    """transformers maps whole checkpoint files into memory, where pages that were read stay; read them tensor by tensor."""
    from transformers import modeling_utils

    opened = modeling_utils.safe_open

    def read(*args: Any, **kwargs: Any) -> Any:
        return opened(*args, **{**kwargs, "backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = opened


def collected(parameters: Mapping[str, Any], keeps: bool) -> dict[str, torch.Tensor]:
    """Whole copies on the CPU where `keeps` is true (on rank 0); all ranks go along, with one tensor at a time."""
    found = {}
    for name, parameter in parameters.items():
        with whole([parameter]):
            if keeps:
                found[name] = parameter.detach().cpu().contiguous().clone()
    return found


@contextmanager
def evaluating(model: Any, ranks: Ranks) -> Iterator[None]:
    """Within it each rank runs as many forwards as it likes; one that is through goes along with the others' until all are.

    At the start of each forward the ranks tell each other whether it is one of their own.
    """
    if not any(is_partitioned(p) for p in model.parameters()):
        yield
        return
    busy = True

    def start() -> None:
        if not ranks.max(int(busy)):
            raise _AllAreThrough

    with gathering(model, start):
        yield
        busy = False
        with suppress(_AllAreThrough):
            while True:
                _go_along(model)


class _AllAreThrough(Exception):
    """No rank has a forward of its own any more."""


@torch.no_grad()
def _go_along(model: Any) -> None:
    ids = torch.full((1, 2), int(model.config.pad_token_id == 0), device=model.device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
