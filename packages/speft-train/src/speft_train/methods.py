"""The ways to adapt a model: a table of functions. Each attaches something trainable, saves it, and puts a saved one
back on.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import speft_core as sc
from speft_core.errors import UserError
from speft_core.targets import base_parameters, parameter_shape, resolve_targets

from .config import AdapterSection, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A model with something trainable on it."""

    model: Any  #: what the Trainer trains
    trainable: int  #: scalars that are trained
    save: Callable[[Path], None]  #: write what ships into an empty folder
    detach: Callable[[], None]  #: take it off; the base is as before
    about: str = ""  #: for the terminal, after the count


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    needs_mask: bool
    attach: Callable[[Any, RunConfig, sc.SparsityMask | None], Attached]
    applied: Callable[[Any, RunConfig, Path], AbstractContextManager[Any]]  #: the base with a saved folder on it


def budget_of(section: AdapterSection) -> sc.Budget:
    """The config's budget as core's."""
    return sc.Budget(**{key: value for key, value in asdict(section.budget).items() if value is not None})


# sparse ---------------------------------------------------------------------------------------------------------------


def _attach_sparse(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    assert mask is not None
    tuner = sc.attach(model, mask, train_dense=cfg.adapter.train_dense, backward=cfg.adapter.backward)

    def save(folder: Path) -> None:
        dtype = DTYPES[cfg.adapter.dtype] if cfg.adapter.dtype else None
        tuner.adapter(dtype, task_type=TASK_TYPES[cfg.model.task]).save(folder)

    plans = Counter(row.plan for row in tuner.plan().values())
    about = "; gradients by " + ", ".join(f"{plan} ({count} tensors)" for plan, count in plans.most_common())
    return Attached(model=model, trainable=tuner.trainable_parameters, save=save, detach=tuner.detach, about=about)


@contextmanager
def _sparse_applied(model: PreTrainedModel, cfg: RunConfig, folder: Path) -> Iterator[Any]:
    with sc.SparseAdapter.load(folder).applied(model):
        yield model


# LoRA -----------------------------------------------------------------------------------------------------------------


def lora_modules(model: Any, section: AdapterSection) -> list[str]:
    """Modules that LoRA adapts: their last names where these say it all, otherwise their full names."""
    names = resolve_targets(model, section.lora.targets or section.targets)
    odd = next((n for n in names if len(parameter_shape(base_parameters(model)[n])) != 2), None)
    if odd is not None:
        raise UserError(f"adapter.lora.targets must be matrices; {odd} is not one: set adapter.lora.targets")
    short = sorted({n.split(".")[-2] for n in names})
    return short if resolve_targets(model, short) == names else [n.rpartition(".")[0] for n in names]


def lora_rank(model: Any, section: AdapterSection) -> int:
    """The rank asked for, or the largest one within the budget."""
    if section.lora.r is not None:
        return section.lora.r
    names = resolve_targets(model, section.lora.targets or section.targets)
    k = budget_of(section).resolve(model, resolve_targets(model, section.targets))
    parameters = base_parameters(model)
    each = sum(sum(parameter_shape(parameters[n])) for n in names)
    if k < each:
        raise UserError(
            f"adapter.budget must hold LoRA of rank 1, which has {each:,} parameters on these targets; got k = {k:,}"
        )
    return k // each


@contextmanager
def _without_old_names() -> Iterator[None]:
    """PEFT asks for an attribute that transformers 5 has renamed, and users can do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _attach_lora(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    import peft

    section, rank = cfg.adapter, lora_rank(model, cfg.adapter)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=section.lora.alpha or rank,  # PEFT takes fractions too
        lora_dropout=section.lora.dropout,
        target_modules=lora_modules(model, section),
        modules_to_save=section.train_dense or None,
        task_type=TASK_TYPES[cfg.model.task],
    )
    wanted = {p: p.requires_grad for p in model.parameters()}
    torch.manual_seed(cfg.seed)  # A starts at random: the same on every rank
    with _without_old_names():
        adapted: Any = peft.get_peft_model(model, settings)

    def save(folder: Path) -> None:
        adapted.save_pretrained(folder)

    def detach() -> None:
        adapted.unload()
        for parameter, required in wanted.items():
            parameter.requires_grad_(required)

    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Attached(model=adapted, trainable=trainable, save=save, detach=detach, about=f"; LoRA of rank {rank}")


@contextmanager
def _lora_applied(model: PreTrainedModel, cfg: RunConfig, folder: Path) -> Iterator[Any]:
    import peft

    with _without_old_names():
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    try:
        yield adapted.eval()
    finally:
        adapted.unload()


# full -----------------------------------------------------------------------------------------------------------------


def _attach_full(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)

    trainable = sum(p.numel() for p in model.parameters())
    return Attached(model=model, trainable=trainable, save=save, detach=lambda: None)


@contextmanager
def _full_applied(model: PreTrainedModel, cfg: RunConfig, folder: Path) -> Iterator[Any]:
    yield type(model).from_pretrained(str(folder), dtype=model.dtype).to(model.device).eval()


METHODS: dict[str, Method] = {
    "sparse": Method(needs_mask=True, attach=_attach_sparse, applied=_sparse_applied),
    "lora": Method(needs_mask=False, attach=_attach_lora, applied=_lora_applied),
    "full": Method(needs_mask=False, attach=_attach_full, applied=_full_applied),
}
