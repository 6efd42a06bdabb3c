"""One body, many heads: the answers of several tasks from one forward.

`MultiHeadModel` puts one (merged) adapter into a model and gives each task its own head. `AdapterBank` (bank.py) is the alternative
for adapters whose changes conflict: each row of a batch is routed to its own adapter.

Shape suffixes: B rows of a batch, T tokens, D hidden size, L labels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .adapter import Applied, SparseAdapter
from .errors import UserError
from .multihead_files import KINDS, Head, Labels, check_labels, check_task, kind_of_outputs, load_heads, load_labels, save_heads
from .targets import base_parameters

__all__ = ["HeadOutput", "MultiHeadModel", "load_heads", "load_labels", "save_heads"]


@dataclass(frozen=True)
class HeadOutput:
    """One task's answer. logits: [B, L] for classification and regression, [B, T, vocabulary] for causal heads."""

    logits: torch.Tensor
    kind: str


class _Heads(nn.Module):
    """Takes the place of the model's head for one call: all heads on the same input, side by side in the last dimension.

    What the model does with its head's output afterwards (picking the last token, a final dropout) is done to all at once.
    """

    def __init__(self, head: nn.Module, tensors: Mapping[str, Head]) -> None:
        super().__init__()
        self._held = [head]  # in a list, so that it is no child: the model's parameters stay the model's
        self.tensors = tensors
        self.widths: dict[str, int] = {}

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs = {}
        head = self._held[0]
        for task, tensors in self.tensors.items():
            outputs[task] = functional_call(head, dict(tensors), args, kwargs) if tensors else head(*args, **kwargs)
        self.widths = {task: out.shape[-1] for task, out in outputs.items()}
        return torch.cat(list(outputs.values()), dim=-1)


class MultiHeadModel:
    """A model with one adapter in its body and several heads on top; `heads(**batch)` answers every task at once.

    model: a Transformers model. adapter: its deltas are applied in place until `close()` (or the end of a `with` block); its
    own dense tensors are not used. heads: task -> {parameter name: tensor}, as an adapter's `.dense`. Names are the model's
    own (`score.weight`, `classifier.out_proj.bias`, …); an empty head means the model's own one. A head that the model's class
    does not have (`score.weight` on a causal model, `lm_head.weight` on a classifier) is put on the last hidden state: at
    the last token of each row for `score.weight`, at every token for `lm_head.weight`.
    kinds: task -> "classification", "regression" or "causal", where the default (by problem type, shape and name) is not right.
    labels: task -> {"id2label": {"0": name, …}, "problem_type": …} as in Transformers' configurations; kept by `save`.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: SparseAdapter | None,
        heads: Mapping[str, Head],
        kinds: Mapping[str, str] | None = None,
        check_base: bool = True,
        labels: Mapping[str, Labels] | None = None,
    ) -> None:
        if not heads:
            raise UserError("heads must name at least one task, got none")
        for task in heads:
            check_task(task)
        self.model, self.adapter = model, adapter
        reference = next(model.parameters())
        self.heads: dict[str, dict[str, torch.Tensor]] = {
            task: {name: t.to(device=reference.device, dtype=reference.dtype) for name, t in head.items()}
            for task, head in heads.items()
        }
        self.labels = {task: check_labels(task, (labels or {}).get(task, {}), head) for task, head in self.heads.items()}
        self._native, self._foreign, self._path = self._sort_heads()
        self.kinds = {task: self._kind(task, (kinds or {}).get(task)) for task in heads}
        self._applied: Applied | None = None
        if adapter is not None:
            body = SparseAdapter(adapter.deltas, {}, adapter.config, adapter.fingerprint)
            self._applied = body.apply(model, check_base)

    def _check_logits(self, task: str) -> None:
        """UserError where the causal model changes its logits, which a head on the hidden state would miss."""
        settings = getattr(self.model, "config", None)
        for name in ("final_logit_softcapping", "softcap", "output_logit_soft_cap", "logit_scale", "logits_scaling", "output_multiplier"):
            value = getattr(settings, name, None)
            if value is not None and value != 1:
                raise UserError(
                    f"head {task!r}: lm_head.weight on a model without one gives other logits than its causal model, which has"
                    f" {name}={value}; load the base as a causal model"
                )

    def _sort_heads(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], str]:
        """Heads by where they sit: on the model's own head module (its path is returned), or on the last hidden state."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        native: dict[str, dict[str, torch.Tensor]] = {}
        foreign: dict[str, torch.Tensor] = {}
        for task, head in self.heads.items():
            if all(name in own for name in head):
                native[task] = head
            elif len(head) == 1 and next(iter(head)) in ("score.weight", "lm_head.weight") and self._backbone() is not None:
                foreign[task] = next(iter(head.values()))
                if "lm_head.weight" in head:
                    self._check_logits(task)
            else:
                missing = next(name for name in head if name not in own)
                raise UserError(
                    f"head {task!r}: the model has no parameter {missing!r}; only score.weight and lm_head.weight may be"
                )
        path = self._head_path({name for head in native.values() for name in head}) if native else ""
        prefix = path + "." if path else ""
        inner: dict[str, dict[str, torch.Tensor]] = {}
        for task, head in native.items():
            inner[task] = {}
            for name, tensor in head.items():
                self._check_shape(task, name, tensor, own[name])
                inner[task][name.removeprefix(prefix)] = tensor
            whole = set(base_parameters(self.model.get_submodule(path)))
            if head and set(inner[task]) != whole and any(inner[task][n].shape != own[prefix + n].shape for n in inner[task]):
                listed = ", ".join(sorted(prefix + n for n in whole))
                raise UserError(f"head {task!r} has another number of labels and must bring all of {listed}")
        return inner, foreign, path

    @staticmethod
    def _check_shape(task: str, name: str, tensor: torch.Tensor, own: torch.Tensor) -> None:
        """A head's tensor may differ from the model's in the number of labels (the first dimension) alone."""
        if tensor.dim() != own.dim() or tensor.shape[1:] != own.shape[1:]:
            raise UserError(
                f"head {task!r}: {name} must have shape (labels, *{tuple(own.shape[1:])}), got {tuple(tensor.shape)}"
            )

    def _head_path(self, names: set[str]) -> str:
        """The module under which all heads' parameters lie: the part of the model that is run once per task."""
        if not names:  # only empty heads: the model's own output
            output = getattr(self.model, "get_output_embeddings", lambda: None)()
            found = [n for n, m in self.model.named_modules() if m is output and output is not None]
            found = found or [n for n in ("score", "classifier", "lm_head") if hasattr(self.model, n)]
            if not found:
                raise UserError("an empty head means the model's own one, and this model has none that is known")
            return found[0]
        parts = [name.split(".")[:-1] for name in sorted(names)]
        common: list[str] = []
        for level in zip(*parts, strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        body = getattr(self.model, "base_model_prefix", "")
        if not common or (common[0] == body and self._backbone() is not None):
            listed = ", ".join(sorted(names))
            raise UserError(
                f"heads must lie in one module on top of the body to share a forward, got {listed}; use AdapterBank"
            )
        return ".".join(common)

    def _backbone(self) -> nn.Module | None:
        prefix = getattr(self.model, "base_model_prefix", "")
        found = getattr(self.model, prefix, None) if prefix else None
        return found if isinstance(found, nn.Module) else None

    def _kind(self, task: str, told: str | None) -> str:
        if told is not None:
            if told not in KINDS:
                raise UserError(f"kind of {task!r} must be one of {', '.join(KINDS)}, got {told!r}")
            return told
        tensors: Mapping[str, torch.Tensor] = self.heads[task]
        if task in self._foreign:
            causal = "lm_head.weight" in tensors
        else:
            own = self.model.get_submodule(self._path)
            output = getattr(self.model, "get_output_embeddings", lambda: None)()
            causal = output is not None and own is output
            tensors = tensors or base_parameters(own)
        return "causal" if causal else kind_of_outputs(tensors.values(), self.labels[task])

    def __call__(self, **batch: Any) -> dict[str, HeadOutput]:
        """One forward of the body; every task's logits. `labels` are not taken: losses are the caller's."""
        if "labels" in batch:
            raise UserError("a multi-head model takes no labels: each task has its own loss, compute it from the logits")
        if self.adapter is not None and self._applied is None:
            raise UserError("this multi-head model is closed; make a new one")
        hidden: list[torch.Tensor] = []
        backbone = self._backbone()
        hook = None
        if self._foreign and backbone is not None:
            hook = backbone.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
        joined = _Heads(self.model.get_submodule(self._path), self._native) if self._native else None
        parent, _, attribute = self._path.rpartition(".")
        owner = self.model.get_submodule(parent)
        try:
            if joined is not None:
                owner._modules[attribute] = joined
                logits = self.model(**batch).logits
            elif backbone is not None:
                accepted = {k: v for k, v in batch.items() if k != "logits_to_keep"}
                backbone(**accepted)
        finally:
            if hook is not None:
                hook.remove()
            if joined is not None:
                owner._modules[attribute] = joined._held[0]
        found: dict[str, torch.Tensor] = {}
        if joined is not None:
            found.update(zip(joined.widths, logits.split(list(joined.widths.values()), dim=-1), strict=True))
        for task, weight in self._foreign.items():
            found[task] = self._on_hidden(self.kinds[task], weight, hidden[-1], batch)
        return {task: HeadOutput(found[task], self.kinds[task]) for task in self.heads}

    def _on_hidden(
        self, kind: str, weight_LD: torch.Tensor, hidden_BTD: torch.Tensor, batch: Mapping[str, Any]
    ) -> torch.Tensor:
        if kind == "causal":
            return nn.functional.linear(hidden_BTD, weight_LD)
        last_B = last_tokens(hidden_BTD, batch, getattr(getattr(self.model, "config", None), "pad_token_id", None))
        logits_BTL = nn.functional.linear(hidden_BTD, weight_LD)
        return logits_BTL[torch.arange(len(last_B), device=last_B.device), last_B]

    def close(self) -> None:
        """Take the adapter off; the model's bits are as before. A second call does nothing."""
        if self._applied is not None:
            self._applied.restore()
            self._applied = None

    def __enter__(self) -> MultiHeadModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, folder: str | Path) -> None:
        """Write body and heads as one folder, which is also an ordinary adapter (without heads)."""
        adapter = self.adapter or SparseAdapter({})
        SparseAdapter(adapter.deltas, {}, adapter.config, adapter.fingerprint).save(folder)
        save_heads(folder, self.heads, self.kinds, self.labels)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, check_base: bool = True) -> MultiHeadModel:
        """Put the body and heads in `folder` onto `model`."""
        heads, kinds = load_heads(folder)
        return cls(model, SparseAdapter.load(folder), heads, kinds, check_base, load_labels(folder))


def last_tokens(hidden_BTD: torch.Tensor, batch: Mapping[str, Any], pad_token_id: int | None) -> torch.Tensor:
    """The position of each row's last real token, as Transformers' classifiers find it: by the padding id, else the mask."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    rows, length = hidden_BTD.shape[:2]
    if ids is not None and pad_token_id is not None:
        real_BT = ids != pad_token_id
    elif mask is not None:
        real_BT = mask.bool()
    else:
        return torch.full((rows,), length - 1, device=hidden_BTD.device)
    positions_T = torch.arange(length, device=hidden_BTD.device)
    return (positions_T * real_BT.to(hidden_BTD.device)).argmax(dim=-1)
