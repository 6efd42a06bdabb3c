"""The ways to adapt a model: a table of functions. Each attaches something trainable, saves it, and puts a saved one
back on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import speft_core as sc
from speft_core.errors import UserError
from speft_core.partitioned import is_partitioned
from speft_core.targets import base_parameters

from . import heads, methods_peft, shards
from .attached import DTYPES, TASK_TYPES, Attached, Method, budget_of
from .config import RunConfig
from .methods_peft import lora_modules, lora_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "Attached", "Method", "budget_of", "lora_modules", "lora_rank", "trained_count"]

# sparse, and what else is kept as a sparse adapter -------------------------------------------------------------------


def _attach_sparse(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    assert mask is not None
    return _attach_tuner(model, cfg, mask, heads.trained(model, cfg))


def _attach_head(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    return _attach_tuner(model, cfg, sc.SparsityMask({}, {}, {}), _head_names(model, cfg))


def _attach_bitfit(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    """Every bias, and the head (BitFit, arXiv 2106.10199)."""
    dense = list(dict.fromkeys([*bias_names(model), *heads.trained(model, cfg)]))
    return _attach_tuner(model, cfg, sc.SparsityMask({}, {}, {}), dense)


def _attach_tuner(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask, dense: list[str]) -> Attached:
    section = cfg.adapter
    keep = DTYPES[section.keep_dtype] if section.keep_dtype else None
    changes = section.dynamic.interval is not None
    tuner = sc.attach(model, mask, dense, section.backward, keep, keep_empty=changes)

    def collect(_keeps: bool) -> Callable[[Path], None]:
        dtype = DTYPES[section.dtype] if section.dtype else None
        adapter = tuner.adapter(dtype, task_type=TASK_TYPES[cfg.model.task])
        if cfg.model.task == "sequence_classification":  # a frozen head ships too: nothing else knows its random start
            adapter = replace(adapter, dense={**heads.tensors(model), **adapter.dense})
        return adapter.save

    plans = Counter(row.plan for row in tuner.plan().values())
    listed = ", ".join(f"{plan} ({count} tensors)" for plan, count in plans.most_common())
    about = f"; gradients by {listed}" if listed else ""
    return Attached(
        model=model, trainable=tuner.trainable_parameters, collect=collect, detach=tuner.detach, about=about, tuner=tuner
    )


@contextmanager
def _sparse_applied(model: PreTrainedModel, cfg: RunConfig, folder: Path, world: int) -> Iterator[Any]:
    with sc.SparseAdapter.load(folder).applied(model):
        yield model


def bias_names(model: Any) -> list[str]:
    """Names of the biases outside the head; UserError for a model without."""
    head = set(heads.parameter_names(model)) if hasattr(model, "base_model") else set()
    found = [n for n in base_parameters(model) if (n == "bias" or n.endswith(".bias")) and n not in head]
    if not found:
        raise UserError("adapter.method bitfit needs a model with biases; this one has none")
    return found


def _head_names(model: Any, cfg: RunConfig) -> list[str]:
    names = heads.trained(model, cfg)
    if not names:
        raise UserError(
            "adapter.method head needs a head to train: model.task=sequence_classification with model.head.train=true,"
            " or adapter.train_dense"
        )
    return names


def trained_count(model: Any, cfg: RunConfig, names: list[str]) -> int:
    """Scalars that the method trains, heads and other dense parts aside; `names` are the targets."""
    section, parameters = cfg.adapter, base_parameters(model)
    if section.method == "full":
        return sum(p.numel() for p in parameters.values())
    if section.method in methods_peft.KINDS:
        each, always = methods_peft.trained_by_rank(model, section)
        return lora_rank(model, section) * each + always
    if section.method == "head":
        return 0
    if section.method == "bitfit":
        return sum(parameters[n].numel() for n in bias_names(model))
    if section.mask is not None:
        mask = sc.SparsityMask.load(section.mask)
        mask.check_model(model)
        return mask.nnz
    return budget_of(section).resolve(model, names)


# full -----------------------------------------------------------------------------------------------------------------


def _attach_full(model: PreTrainedModel, cfg: RunConfig, mask: sc.SparsityMask | None) -> Attached:
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def collect(keeps: bool) -> Callable[[Path], None]:
        if not any(is_partitioned(p) for p in model.parameters()):
            return lambda folder: model.save_pretrained(folder)
        state = shards.collected(dict(model.named_parameters()), keeps)  # the whole model, in rank 0's host memory
        state |= {name: buffer for name, buffer in model.state_dict().items() if name not in state and buffer.numel()}
        return lambda folder: model.save_pretrained(folder, state_dict=state)

    return Attached(model=model, trainable=shards.total(model), collect=collect, detach=lambda: None)


@contextmanager
def _full_applied(model: PreTrainedModel, cfg: RunConfig, folder: Path, world: int) -> Iterator[Any]:
    with shards.loading(cfg.deepspeed, world) as finish:
        tuned = type(model).from_pretrained(str(folder), dtype=model.dtype)
    finish(tuned)
    yield tuned.to(model.device).eval()


METHODS: dict[str, Method] = {
    "sparse": Method(needs_mask=True, attach=_attach_sparse, applied=_sparse_applied),
    **{kind: Method(needs_mask=False, attach=methods_peft.attach, applied=methods_peft.applied) for kind in methods_peft.KINDS},
    "full": Method(needs_mask=False, attach=_attach_full, applied=_full_applied),
    "head": Method(needs_mask=False, attach=_attach_head, applied=_sparse_applied),
    "bitfit": Method(needs_mask=False, attach=_attach_bitfit, applied=_sparse_applied),
}
