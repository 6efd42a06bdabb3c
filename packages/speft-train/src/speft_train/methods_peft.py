"""LoRA, PiSSA and DoRA through PEFT, for comparison at the same count of trained parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

import speft_core as sc
from speft_core.errors import UserError
from speft_core.partitioned import is_partitioned, own_part
from speft_core.targets import base_parameters, parameter_shape, resolve_targets

from . import engine, heads
from .attached import TASK_TYPES, Attached, budget_of
from .config import AdapterSection, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FROZEN_HEAD = "head.safetensors"
NAMES = {"lora": "LoRA", "pissa": "PiSSA", "dora": "DoRA"}
# What PEFT is told beside rank, scale and targets. PiSSA starts from the largest singular vectors of each weight.
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True}}


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
    k = budget_of(section).resolve(model, resolve_targets(model, section.targets))
    each, always = trained_by_rank(model, section)
    if k < each + always:
        raise UserError(
            f"adapter.budget must hold {NAMES[section.method]} of rank 1, which has {each + always:,} parameters on these targets;"
            f" got k = {k:,}"
        )
    return (k - always) // each


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT asks for an attribute that transformers 5 has renamed, and users can do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def trained_by_rank(model: Any, section: AdapterSection) -> tuple[int, int]:
    """(parameters of each rank, parameters whatever the rank) on the targets; DoRA has a magnitude for each output."""
    parameters = base_parameters(model)
    shapes = [parameter_shape(parameters[n]) for n in resolve_targets(model, section.lora.targets or section.targets)]
    return sum(sum(shape) for shape in shapes), sum(shape[0] for shape in shapes) if section.method == "dora" else 0


def attach(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    """Put PEFT's matrices beside the targets."""
    import peft

    section, rank, dense = cfg.adapter, lora_rank(model, cfg.adapter), heads.trained(model, cfg)
    frozen = cfg.model.task == "sequence_classification" and not cfg.model.head.train
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=section.lora.alpha or rank,  # PEFT takes fractions too
        lora_dropout=section.lora.dropout,
        target_modules=lora_modules(model, section),
        modules_to_save=dense or None,
        task_type=None if frozen else TASK_TYPES[cfg.model.task],  # with a task type PEFT trains the head by itself
        **KINDS[section.method],
    )
    wanted = {p: p.requires_grad for p in model.parameters()}
    own = _modules(model, dense)
    changed = resolve_targets(model, section.lora.targets or section.targets) if section.method == "pissa" else []
    before = {p: own_part(p).clone() for n, p in base_parameters(model).items() if n in changed}
    torch.manual_seed(cfg.seed)  # A starts at random: the same on every rank
    in_shards = any(is_partitioned(p) for p in model.parameters())
    with _quietly(), engine.announced() if in_shards else nullcontext():
        adapted: Any = peft.get_peft_model(model, settings)
    first = peft.get_peft_model_state_dict(adapted) if changed else {}
    first = {key: value.detach().clone() for key, value in first.items()}

    def collect(_keeps: bool) -> Callable[[Path], None]:
        head = heads.tensors(model) if frozen else {}

        def write(folder: Path) -> None:
            with _quietly():
                if changed:
                    _save_as_lora(adapted, first, folder)
                else:
                    adapted.save_pretrained(folder)
            if head:
                safetensors.torch.save_file(head, str(folder / FROZEN_HEAD))

        return write

    def detach() -> None:
        adapted.unload()
        for name, module in own.items():  # PEFT leaves its trained copy in their place
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
        for parameter, value in before.items():
            own_part(parameter).copy_(value)
        for parameter, required in wanted.items():
            parameter.requires_grad_(required)

    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Attached(
        model=adapted, trainable=trainable, collect=collect, detach=detach, about=f"; {NAMES[section.method]} of rank {rank}"
    )


@contextmanager
def applied(model: PreTrainedModel, cfg: RunConfig, folder: Path, world: int) -> Iterator[Any]:
    """The base with a saved PEFT folder on it; a frozen head is the base's own."""
    import peft

    own = _modules(model, heads.trained(model, cfg))
    with _quietly():
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        for name, module in own.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)


def _save_as_lora(adapted: Any, first: dict[str, torch.Tensor], folder: Path) -> None:
    """PiSSA subtracts its start B0 A0 from the weights; saved as LoRA of twice the rank, [B, -B0] [A; A0], it fits the
    untouched base.
    """
    import peft

    now = peft.get_peft_model_state_dict(adapted)
    both = {}
    for name, tensor in now.items():
        if ".lora_A." in name:
            tensor = torch.cat([tensor, first[name]])
        elif ".lora_B." in name:
            tensor = torch.cat([tensor, -first[name]], dim=1)
        both[name] = tensor.detach().cpu().contiguous()
    mine = adapted.peft_config["default"]
    settings = copy.copy(mine)
    settings.r, settings.lora_alpha, settings.init_lora_weights = 2 * mine.r, 2 * mine.lora_alpha, True
    settings.inference_mode = True
    settings.save_pretrained(folder)
    safetensors.torch.save_file(both, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _modules(model: Any, names: list[str]) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if any(n == name or n.endswith("." + name) for name in names)}
