"""Classification heads: how they start, which parameters they are, and how they ship.

On a decoder the head is a matrix on the last real token's state, without a bias (SpaRTA, arXiv 2502.15975): random with
the small spread 0.06 / sqrt(width) for a base model, or the rows of the vocabulary head that belong to answer words, for
a model that follows instructions. The vocabulary head and the embeddings are never touched. An encoder keeps the head
of its architecture, and a checkpoint that is a classifier of as many classes its own: in the order of the data's labels,
where it calls its outputs by these names.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from speft_core.errors import UserError
from speft_core.partitioned import whole
from speft_core.targets import base_parameters, parameter_shape

from . import shards
from .config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .data.labels import LabelSpace

BASE_SPREAD = 0.06
IS_LOADED = "_speft_head_is_loaded"  # on a model: its head came with the checkpoint
IS_SORTED = "_speft_head_is_sorted"  # its rows have changed places since


def modules(model: Any) -> dict[str, nn.Module]:
    """The modules that make up the head: all at the top level beside the base model."""
    body = model.base_model
    return {name: m for name, m in model.named_children() if m is not body and any(True for _ in m.parameters())}


def parameter_names(model: Any) -> list[str]:
    """Names of the head's parameters, without what `attach` adds."""
    head = modules(model)
    return [name for name in base_parameters(model) if name.partition(".")[0] in head]


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the head's parameters by name; of a model in shards on all ranks, which call this together."""
    own = base_parameters(model)
    return shards.collected({name: own[name] for name in parameter_names(model)}, keeps=True)


def trained(model: Any, cfg: RunConfig) -> list[str]:
    """What is trained whole beside the adapter: adapter.train_dense, and the head of a classification."""
    names = list(cfg.adapter.train_dense)
    if cfg.model.task == "sequence_classification" and cfg.model.head.train:
        names += [name for name in modules(model) if name not in names]
    return names


def about(model: Any, cfg: RunConfig) -> str:
    """One line on the head's policy."""
    settings = cfg.model.head
    start = "the checkpoint" if getattr(model, IS_LOADED, False) else "a random start"
    if getattr(model, IS_SORTED, False):
        start += ", its outputs put in the order of the labels"
    if settings.words:
        start = "the vocabulary rows of " + ", ".join(settings.words.values())
    fate = "trained whole" if settings.train else "left frozen"
    own = base_parameters(model)
    count = sum(math.prod(parameter_shape(own[name])) for name in parameter_names(model))
    return f"head: {', '.join(modules(model))}, {count:,} parameters, from {start}, {fate}"


def places(own: Sequence[Any], names: Sequence[str]) -> list[int]:
    """For each label of the data the checkpoint's output of that name, whatever its case; none where the two are not the same names,
    as LABEL_0, or not in another order.
    """
    theirs, ours = [str(name).strip().casefold() for name in own], [name.casefold() for name in names]
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        return []
    return [theirs.index(name) for name in ours]


def start(
    model: Any, tokenizer: Any, cfg: RunConfig, labels: LabelSpace, world: int = 1, is_loaded: bool = False, order: Sequence[int] = ()
) -> None:
    """Give a fresh head its first values, the same for a seed. One that came with the checkpoint keeps its own, unless the config
    asks for a start (init_std, words; bias); order: which of its outputs stands for each label, if they are to change places.
    """
    setattr(model, IS_LOADED, is_loaded and cfg.model.head.init_std is None)
    setattr(model, IS_SORTED, bool(order) and getattr(model, IS_LOADED) and not cfg.model.head.words)
    with whole(_last(model).parameters(), change=True):  # that of a classifier's checkpoint lies in shards already
        if getattr(model, IS_SORTED):
            _sort(_last(model), order)
        _start_weights(model, tokenizer, cfg, labels, world)
        if cfg.model.head.bias == "labels" and labels.blind:
            bias = _last(model).bias
            if bias is None:
                raise UserError(
                    f"model.head.bias=labels needs a head with a bias; that of {cfg.model.name} has none: leave it at zero"
                )
            with torch.no_grad():
                bias.copy_(torch.tensor(labels.blind))


@torch.no_grad()
def _sort(last: nn.Linear, order: Sequence[int]) -> None:
    for parameter in last.parameters():
        parameter.copy_(parameter[list(order)])


def _last(model: Any) -> nn.Linear:
    linears = [m for head in modules(model).values() for m in head.modules() if isinstance(m, nn.Linear)]
    assert linears, "a classification model has a head"
    return linears[-1]


def _start_weights(model: Any, tokenizer: Any, cfg: RunConfig, labels: LabelSpace, world: int) -> None:
    from .models import is_encoder

    settings = cfg.model.head
    last = _last(model)
    if settings.words:
        rows_OH = _word_rows(tokenizer, cfg, labels, world)
        if is_encoder(model.config) or rows_OH.shape != last.weight.shape:
            raise UserError(f"model.head.words needs a decoder whose head reads its last state; {cfg.model.name} is not one")
        with torch.no_grad():
            last.weight.copy_(rows_OH)
        return
    if settings.init_std is None and (getattr(model, IS_LOADED) or is_encoder(model.config)):
        return
    spread = settings.init_std or BASE_SPREAD / math.sqrt(last.in_features)
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.no_grad():
        drawn_OH = torch.randn(last.weight.shape, generator=generator) * spread
        last.weight.copy_(drawn_OH)
        if last.bias is not None:
            last.bias.zero_()


def _word_rows(tokenizer: Any, cfg: RunConfig, labels: LabelSpace, world: int) -> torch.Tensor:
    """(classes, width): the rows of the vocabulary head for the answer words."""
    import transformers

    from .models import DTYPES, locate

    words = cfg.model.head.words
    if labels.is_regression or set(words) != set(labels.names):
        wanted = "none, for labels are numbers" if labels.is_regression else ", ".join(labels.names)
        raise UserError(f"model.head.words must name a word for every label ({wanted}); got {', '.join(words)}")
    tokens = []
    for name in labels.names:
        ids = tokenizer(words[name], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            pieces = " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"model.head.words.{name} must be one token of the vocabulary; {words[name]!r} is {len(ids)} ({pieces})."
                " A leading space often matters"
            )
        tokens.append(ids[0])
    if len(set(tokens)) < len(tokens):
        raise UserError(f"model.head.words must be different words; got {', '.join(words.values())}")
    with shards.loading(cfg.deepspeed, world):
        decoder = transformers.AutoModelForCausalLM.from_pretrained(
            locate(cfg.model), dtype=DTYPES.get(cfg.model.dtype, "auto"), trust_remote_code=False,
            revision=cfg.model.revision or "main", cache_dir=cfg.model.cache_dir,
        )  # fmt: skip
    weight = decoder.get_output_embeddings().weight
    with whole([weight]):
        rows: torch.Tensor = weight[tokens].detach().cpu().clone()
    return rows
